"""The origin of a run: the settings, inputs and code that decide its numbers, compared when it is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

import minimind_v
from minimind_v.core.config.load import as_settings
from minimind_v.core.config.schema import LINEAR, RunConfig, TextConfig
from minimind_v.core.device import device_name, resolve_dtype
from minimind_v.core.errors import UsageError, nearest
from minimind_v.core.extensions import extensions_digest
from minimind_v.core.hub.sources import METADATA
from minimind_v.core.monitor.records import flatten
from minimind_v.core.source import source_digest

PIECE = 1 << 20  # bytes read at a time
MANY = 1000  # files of a folder beyond which their bytes are not read for its fingerprint
WHOLE = 1 << 30  # bytes up to which a file is read whole for its fingerprint; of a larger one, so many in pieces
# Keys that a resume may change: they decide where files go and what is reported, not what the model learns.
# The division of a step's rows is free as well, unless experts are balanced over micro-batches (`RunFolder.claim`);
# their number is not, and has its own key.
FREE = {"out", "device", "gpus", "save_every", "save_minutes", "keep", "log_every", "recall_rows", "data.workers"}
FREE |= {"data.bad_rows", "data.batch_size", "accumulate", "features_dir", "track"}
FREE |= {"eval_every", "eval_task", "eval_data", "eval_images", "eval_limit", "best_by"}
# Packages and modules of core that decide the numbers of a run: after a change of what they compute, a resume is
# refused. The other imports of a run (a test computes them) report, check or move files.
DECIDING = (
    "model", "rows", "data", "formats/checkpoint.py", "formats/description.py", "formats/load.py",
    "formats/tensor_files.py", "formats/torch_files.py", "formats/vision_tower.py", "formats/hf/lfm2_names.py",
    "formats/hf/names.py", "formats/hf/read.py", "train/build.py", "train/distributed.py", "train/freeze.py",
    "train/gradients.py", "train/graph.py", "train/loop.py", "train/progress.py", "train/resume.py", "train/run.py",
    "train/step.py", "config/freeze.py", "config/generation.py", "config/schedule.py", "cpu_sharing.py",
    "cuda_graph.py", "device.py",
)  # fmt: skip
OTHERS = {"rows/writers.py", "data/picture_names.py", "data/processor.py"}  # no step imports these
# Keys that earlier releases did not record, with the values that these had.
ADDED = {
    "projector": LINEAR,
    "reduce_dtype": RunConfig.reduce_dtype,
    "model.qk_norm": TextConfig.qk_norm,
    "model.aux_loss_scope": TextConfig.aux_loss_scope,
}
INPUTS = ("data.file", "data.images", "data.tokenizer", "vision_model", "init")  # compared by their bytes


def origin_of(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """All settings that decide the numbers of a run, by configuration key; of its inputs, fingerprints."""
    flat = flatten(as_settings(config))
    origin = {key: value for key, value in flat.items() if key not in FREE and key not in INPUTS}
    for key in INPUTS:
        path = Path(flat[key] or "none")
        if key == "data.tokenizer":
            path = path / "tokenizer.json"  # its folder may hold other files
        origin[key] = fingerprint(path) if path.exists() else None
    origin["features"] = "int8" if config.features == "int8" else "exact"  # a cache does not change them
    origin["code"] = _installed_code()
    if extensions := extensions_digest():
        origin["extensions"] = extensions
    origin["torch"] = torch.__version__
    origin["precision"] = resolve_dtype(device, config.dtype)  # `auto` depends on the device
    origin["computed_on"] = device_name(device)
    return origin


def deciding_modules(core: Path) -> list[Path]:
    """The files of DECIDING, sorted; `core` is the folder of the packages."""
    files = (file for name in DECIDING for file in ((core / name).rglob("*.py") if "." not in name else [core / name]))
    return sorted(file for file in files if file.relative_to(core).as_posix() not in OTHERS)


@cache
def _installed_code() -> str:
    return source_digest(deciding_modules(Path(minimind_v.__file__).parent / "core"))


def check_origin(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str], warn: Callable[[str], None]
) -> None:
    """Warn of allowed differences between a state's run and this one. Raises UsageError with all others."""
    for name in allowed:
        if name not in now:
            raise UsageError(f"--allow {name} is not a key of a run{nearest(name, now)}")
    before = ADDED | dict(before)
    differences = {
        key: f"{key}: {_shown(before.get(key))} in the interrupted run, {_shown(now[key])} now"
        for key in now
        if before.get(key) != now[key]
    }
    for key in [key for key in differences if key in allowed]:
        warn(f"{differences.pop(key)} (allowed)")
    if differences:
        raise UsageError(
            f"this run differs from the interrupted one — accept it with "
            f"{' '.join(f'--allow {key}' for key in differences)}, start over with --overwrite, or use the same inputs",
            [*differences.values()],
        )


def fingerprint(path: Path) -> str:
    """Size and digest of a file, of a very large one by pieces all over it; of a folder, of its files.

    Of a folder of more than MANY files, such as pictures, only names, sizes and the bytes of the metadata count.
    """
    if path.is_dir():
        names = {file: file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()}
        files = [file for file, name in names.items() if not any(folder.startswith(".") for folder in name.parts)]
        many = len(files) > MANY
        contents = [
            (str(names[file]), file.stat().st_size if many and file.name not in METADATA else fingerprint(file))
            for file in files
        ]
        listed = json.dumps(contents).encode()
        return f"{len(files)} files {hashlib.blake2b(listed, digest_size=8).hexdigest()}"
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        for at in [*range(0, size, max(1, size // WHOLE) * PIECE), max(0, size - PIECE)]:
            file.seek(at)
            digest.update(file.read(PIECE))
    return f"{size} bytes {digest.hexdigest()}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)
