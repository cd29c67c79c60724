"""`mmv info`: describe a file or a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import DataError, MissingInput, RowError, UsageError, nearest_file, shorten
from minimind_v.core.hub.sources import PICTURE_ENDINGS, ROWS, WEIGHTS_ENDINGS, weights_of_run

if TYPE_CHECKING:
    from minimind_v.core.formats.checkpoint import Checkpoint

# What a person reads in place of these keys.
LABELS = {"bytes": "size", "pictures": "images", "seconds": "time", "data_seconds": "time_for_data"}
# Settings of a mixture of experts.
EXPERTS = (
    "use_moe", "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "aux_loss_alpha", "aux_loss_scope",
)  # fmt: skip


def info(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Checkpoint, exported folder, dataset, run folder or metrics.jsonl.")
    ],
    split: options.Split = None,
    images: options.Images = None,
    json: options.Json = False,
) -> None:
    """Describe a checkpoint, an exported folder, a dataset or a run."""
    if not file.exists():
        kinds = (WEIGHTS_ENDINGS, ROWS, PICTURE_ENDINGS)
        endings = next((endings for endings in kinds if file.name.endswith(endings)), ("",))
        raise MissingInput(f"no file {file}{nearest_file(file, endings, folders=True)}")
    description = _described(file, split, images)
    for option, value in (("--split", split), ("--images", images)):
        if value is not None and description["kind"] != "dataset":
            raise UsageError(f"{option} {value}: {file} is not a dataset — remove {option}")
    terminal = Terminal()
    terminal.json(description) if json else terminal.table(_for_people(description))


def _for_people(description: dict[str, Any]) -> dict[str, str]:
    """The values with units, rounded; without empty ones, and without those of experts that a dense model lacks."""
    dense = () if description.get("use_moe") else EXPERTS
    return {
        LABELS.get(name, name): _for_person(name, value)
        for name, value in description.items()
        if value not in (None, "", []) and name not in dense
    }


def _for_person(name: str, value: Any) -> str:
    from minimind_v.core.pages.run_report import duration
    from minimind_v.core.wording import size

    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if name == "bytes":
        return size(value)
    if name in ("seconds", "data_seconds"):
        return duration(value)
    if name == "token_accuracy":
        return f"{value:.1%}"
    if isinstance(value, float) and (not value.is_integer() or abs(value) >= 1e15):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,.0f}" if isinstance(value, int | float) and name != "seed" else str(value)


def _described(file: Path, split: str | None = None, images: Path | None = None) -> dict[str, Any]:
    """The description of a file, by its name first: only weights need torch."""
    ending = file.suffix.lower()
    if file.is_file() and ending == ".zip":
        return _zip(file)
    if file.is_file() and ending in PICTURE_ENDINGS:
        return _picture(file)
    if (file / "config.json").is_file():
        return _weights(file) | _export(file)
    if _is_data(file):
        return _data(file, split, images)
    if file.name == "metrics.jsonl" or (file / "metrics.jsonl").is_file():
        return _run(file / "metrics.jsonl" if file.is_dir() else file)
    from minimind_v.core.formats.gguf.read import describe_gguf, is_gguf

    if is_gguf(file):
        return describe_gguf(file)
    if file.is_dir():
        return _run(file / "metrics.jsonl")
    if ending not in WEIGHTS_ENDINGS and file.is_file():
        from minimind_v.core.rows.strangers import WORKBOOK, no_rows, stand_in

        if (problem := stand_in(file)) or (problem := no_rows(file)) == WORKBOOK:
            raise DataError(f"{file}: {problem}")
    return _weights(file)


def _is_data(file: Path) -> bool:
    from minimind_v.core.rows.stores import find_store

    return file.name != "metrics.jsonl" and find_store(file) is not None


def _zip(file: Path) -> dict[str, Any]:
    from minimind_v.core.rows.archives import ZipPictures
    from minimind_v.core.rows.strangers import no_rows

    members = len(ZipPictures(file))
    return {"kind": "zip", "file": str(file), "members": members, "bytes": file.stat().st_size, "use": no_rows(file)}


def _picture(file: Path) -> dict[str, Any]:
    from minimind_v.core.data.images import decode

    width, height = decode(file.read_bytes(), str(file)).size
    size = file.stat().st_size
    return {"kind": "picture", "file": str(file), "width": width, "height": height, "bytes": size}


def _weights(file: Path) -> dict[str, Any]:
    from minimind_v.core.config.presets import name_preset
    from minimind_v.core.formats.checkpoint import read_checkpoint
    from minimind_v.core.formats.load import check_whole

    checkpoint = read_checkpoint(file)
    check_whole(checkpoint)
    matrices = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.ndim > 1}  # biases may be zeros
    if zeros := [name for name, tensor in matrices.items() if not tensor.float().any()]:
        Terminal().warn(f"{file}: zeros alone in {len(zeros)} of {len(matrices)} matrices ({shorten(', '.join(zeros))})"
                        " — copy or download it again")  # fmt: skip
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()})
    return {
        "kind": "weights",
        "file": str(file),
        "stage": checkpoint.stage,
        "preset": name_preset(checkpoint.config),
        "generation": checkpoint.generation.name,
        "parameters": checkpoint.parameters,
        "vision_width": checkpoint.vision_width,
        "projector": checkpoint.projector,
        "dtype": "/".join(types),
        "ignored_tensors": len(checkpoint.ignored),
        **_trained_with(checkpoint),
        "sizes_from": "the shapes of its tensors" if checkpoint.guessed else "its own description",
        **asdict(checkpoint.config),
    }


def _trained_with(checkpoint: Checkpoint) -> dict[str, str]:
    """The vision model and the tokenizer of the weights' run, where the weights or the run record them."""
    companions = checkpoint.companions
    pairs = (("vision_model", companions.vision_model), ("tokenizer", companions.tokenizer))
    return {
        name: str(next((path for path in companion.paths if path.exists()), f"{companion.paths[-1]}, missing"))
        for name, companion in pairs
        if companion
    } | {"layout": companions.layout or checkpoint.generation.layout}


def _export(folder: Path) -> dict[str, Any]:
    """The further fields of an exported folder."""
    from minimind_v.core.export.folder import read_manifest
    from minimind_v.core.files import object_in, size_of
    from minimind_v.core.formats.hf.read import is_export

    fields: dict[str, Any] = {"kind": "published layout, with custom code", "bytes": size_of(folder)}
    if is_export(folder):
        from minimind_v.core.model.vision.encoder import read_vision_spec

        spec = read_vision_spec(folder)
        fields |= {
            "kind": "hf",
            "opened_by": "transformers, AutoModelForImageTextToText",
            "image_size": spec.image_size,
            "tokens_per_image": spec.tokens_per_image,
        }
    manifest = read_manifest(folder)
    if manifest is None:
        return fields | {"came_from": "unknown: not written by mmv convert"}
    source, verified = (object_in(manifest, key) for key in ("source", "verified"))
    return fields | {
        "came_from": source.get("name"),
        "source_sha256": source.get("sha256"),
        "made_by": manifest.get("made_by"),
        "verified": "; ".join(f"{name}: {value}" for name, value in verified.items()) or "no",
    }


def _data(file: Path, split: str | None, images: Path | None) -> dict[str, Any]:
    from minimind_v.core.config.load import images_beside
    from minimind_v.core.files import size_of
    from minimind_v.core.rows.stores import open_rows

    rows = open_rows(file, images or images_beside(file), split, say=Terminal().say)
    try:
        first = rows.row(0)
    except RowError as error:
        raise DataError(f"{rows.location(0)}: {error}") from None
    return {
        "kind": "dataset",
        "files": rows.file_kind,
        "file": str(file),
        **({"split": rows.split} if rows.split else {}),
        "form": first.form or "unknown: no conversation in the first row",
        "rows": len(rows),
        "bytes": size_of(file),
        "pictures": str(rows.pictures or ""),
        "first_row_images": first.images,
        "first_row_messages": len(first.conversations) if isinstance(first.conversations, list) else 0,
    }


def _run(file: Path) -> dict[str, Any]:
    from minimind_v.core.monitor.metrics import read_metrics
    from minimind_v.core.rows.strangers import no_set

    if not file.is_file():
        files = sorted(path.name for path in file.parent.iterdir() if path.suffix in (*WEIGHTS_ENDINGS, *ROWS))
        if not files:
            raise MissingInput(f"{file.parent} is not itself a model, dataset or run: {no_set(file.parent)}")
        names = f"one of its files: {', '.join(files[:5])}{', …' if len(files) > 5 else ''}"
        if any(name.endswith(WEIGHTS_ENDINGS) for name in files):
            names = f"one of the runs and weights that `mmv runs {file.parent}` lists"
        raise MissingInput(f"{file.parent} is not itself a model, dataset or run — name {names}")
    metrics = read_metrics(file)
    weights = weights_of_run(file.parent)
    result = {} if weights == file.parent else {"weights": str(weights)}
    about = {"first_loss": metrics[0]["loss"], "records": len(metrics)}
    return {"kind": "run", "file": str(file)} | result | about | metrics[-1]
