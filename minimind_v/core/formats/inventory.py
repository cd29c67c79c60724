"""List the runs and weights in a folder from headers, JSON and metrics, without reading tensors."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minimind_v.core.config.presets import PRESETS, weights_name
from minimind_v.core.errors import MissingInput, WeightsError
from minimind_v.core.files import object_in, read_notes, size_of
from minimind_v.core.hub.sources import META, WEIGHTS_ENDINGS
from minimind_v.core.monitor.records import is_number

MANIFEST = "mmv_export.json"  # in an exported folder: its format, source and files
_TAIL = 1 << 16  # bytes at the end of a file of records, which hold its last ones
_NAME = re.compile(r"(?P<stage>lm|llm|pretrain|sft)(_vlm)?_(?P<hidden>\d+)(?P<moe>_moe)?")
_FIRST_BYTES = {".pth": (b"PK\x03\x04", b"\x80"), ".gguf": (b"GGUF",)}


@dataclass(frozen=True)
class Entry:
    """A run, a weights file or an exported folder."""

    name: str
    kind: str  # run, weights or export
    stage: str  # lm, pretrain, sft or unknown
    model: str  # a preset, or sizes
    steps: int | None  # so far; None for weights and exports
    total_steps: int | None
    loss: float | None  # of the last logged step
    modified: str  # ISO 8601: of a run when it last logged a step, else of the newest file
    bytes: int
    damage: str = ""  # why it cannot be read


def list_runs(folder: Path) -> list[Entry]:
    """The entries of a folder, the newest first. Raises MissingInput if there is no such folder."""
    if not folder.is_dir():
        raise MissingInput(f"no folder {folder} — `mmv train pretrain` makes it")
    paths = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
    runs = {name for name, path in paths.items() if (path / "metrics.jsonl").is_file()}
    entries = [_run(folder, name, paths) for name in runs]
    for path in paths.values():
        if path.is_file() and path.suffix in (*WEIGHTS_ENDINGS, ".gguf") and path.stem not in runs:
            entries.append(_weights(path))
        elif (path / "config.json").is_file() or (path.is_dir() and any(path.glob("*.gguf"))):
            entries.append(_export(path))
    return sorted(entries, key=lambda entry: (entry.modified, entry.name), reverse=True)


def preset_at(weights: Path) -> str:
    """The preset of weights, or several, or their sizes."""
    return _stage_and_model(weights.name, _describe(weights)[0])[1]


def _run(folder: Path, name: str, paths: dict[str, Path]) -> Entry:
    """A run: its folder, and the weights of the same name beside it."""
    weights = [paths[name + ending] for ending in WEIGHTS_ENDINGS if name + ending in paths]
    try:
        last = next((record for record in _last_records(folder / name / "metrics.jsonl") if _has_loss(record)), {})
        saved = [event["step"] for event in _last_records(folder / name / "events.jsonl")]
        damage = "" if last else "metrics.jsonl has no logged step"
    except OSError as error:
        last, saved, damage = {}, [], f"{Path(error.filename).name}: {error.strerror}"
    notes, broken = _describe(weights[0]) if weights else ({}, "")
    steps, total, loss = (last.get(key) for key in ("step", "steps", "loss"))
    if steps is not None:  # a run saves, and stops, between two logged steps, too
        steps = max(steps, *saved, 0)
    logged, _ = _date_and_size([folder / name / "metrics.jsonl"])  # a report is written later, too
    _, size = _date_and_size([folder / name, *weights, folder / f"{name}.json"])
    return Entry(name, "run", *_stage_and_model(name, notes), steps, total, loss, logged, size, damage or broken)


def _weights(path: Path) -> Entry:
    notes, damage = _describe(path)
    return Entry(path.name, "weights", *_stage_and_model(path.name, notes), None, None, None,
                 *_date_and_size([path, path.with_suffix(".json")]), damage)  # fmt: skip


def _export(folder: Path) -> Entry:
    """A folder for transformers or llama.cpp."""
    config = read_notes(folder / "config.json")
    sizes = object_in(config, "text_config") or config
    damage = "config.json is not a JSON object" if not config and (folder / "config.json").is_file() else ""
    notes = read_notes(folder / MANIFEST) | {"model": sizes}
    return Entry(folder.name, "export", *_stage_and_model(folder.name, notes), None, None, None,
                 *_date_and_size([folder]), damage)  # fmt: skip


def _describe(path: Path) -> tuple[dict[str, Any], str]:
    """The description of weights, and why the file cannot be read."""
    try:
        return _read_description(path), ""
    except WeightsError as error:
        return {}, str(error).removeprefix(f"{path}: ")
    except OSError as error:
        return {}, error.strerror or str(error)


def _read_description(path: Path) -> dict[str, Any]:
    """The description of weights. Raises WeightsError where a file is cut short, or is of another kind."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np") as file:
                notes = json.loads((file.metadata() or {}).get(META, "{}"))
        except (SafetensorError, ValueError, RecursionError) as error:
            raise WeightsError(f"{path}: not a whole safetensors file ({error})") from None
        return notes if isinstance(notes, dict) else {}
    with path.open("rb") as file:
        first = file.read(4)
    if not first.startswith(_FIRST_BYTES[path.suffix]):
        raise WeightsError(f"{path}: not a {path.suffix} file")
    if first.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise WeightsError(f"{path}: the file is cut short")
    return read_notes(path.with_suffix(".json"))


def _stage_and_model(name: str, notes: dict[str, Any]) -> tuple[str, str]:
    """The stage, and a preset or sizes: from the description, else from the published form of the name."""
    sizes, match = object_in(notes, "model"), _NAME.match(name)
    stage = notes.get("stage") or (match["stage"].replace("llm", "lm") if match else "unknown")
    hidden, layers = sizes.get("hidden_size"), sizes.get("num_hidden_layers")
    moe = bool(sizes.get("use_moe", sizes.get("num_local_experts", sizes.get("num_experts"))))
    head_norms = bool(sizes.get("qk_norm", str(sizes.get("model_type")).startswith("qwen3")))  # of transformers
    if notes.get("preset") in PRESETS:
        return str(stage), str(notes["preset"])
    if hidden and layers:
        for preset, model in PRESETS.items():
            own = (model.hidden_size, model.num_hidden_layers, model.use_moe, model.qk_norm)
            if own == (hidden, layers, moe, head_norms):
                return str(stage), preset
        return str(stage), f"{hidden} × {layers}{' MoE' if moe else ''}"
    if match:
        names = {f"{match[0]}.pth", f"{match[0].replace('llm_', 'lm_')}.pth"}  # `llm_` is also an old name of `lm_`
        presets = [key for key, model in PRESETS.items() if weights_name(stage, model) in names]
        return str(stage), " or ".join(presets) or match["hidden"] + (" MoE" if match["moe"] else "")
    return str(stage), "unknown"


def _last_records(path: Path) -> Iterator[dict[str, Any]]:
    """The last records with a step in a file of a run, the newest first; none without a file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and is_number(record.get("step")):
            yield record


def _has_loss(record: dict[str, Any]) -> bool:
    return is_number(record.get("loss"), finite=False)


def _date_and_size(files: Iterable[Path]) -> tuple[str, int]:
    paths = [path for root in files for path in (root, *root.rglob("*")) if path.is_file()]
    newest = max((path.stat().st_mtime for path in paths), default=0.0)
    return datetime.fromtimestamp(newest).isoformat(timespec="seconds"), sum(map(size_of, paths))
