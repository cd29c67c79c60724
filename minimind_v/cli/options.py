"""Option types that several commands share. Defaults are where the stages before leave things."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind_v.core.paths import TOKENIZER_DIR, VISION_DIR

if TYPE_CHECKING:
    from minimind_v.core.formats.load import LoadedModel

Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="FILE|DIR",
        help="Weights (.pth, .safetensors) or an exported folder. [default: the latest in ./out, else the demo's]",
    ),
]
VisionOfRows = Annotated[
    Path | None,
    typer.Option(
        "--vision-model",
        metavar="DIR",
        help=f"Folder of the CLIP vision model. [default: {VISION_DIR}; without it, the size that all presets look at]",
    ),
]
TokenizerDir = Annotated[Path, typer.Option("--tokenizer", metavar="DIR", help="Folder of tokenizer.json.")]
# The same beside --model, which may be a folder that has them itself.
VisionOfModel = Annotated[
    Path | None,
    typer.Option(
        "--vision-model",
        metavar="DIR",
        help=f"Folder of the CLIP vision model. [default: that of --model's folder or run, else {VISION_DIR}]",
    ),
]
TokenizerOfModel = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="DIR",
        help=f"Folder of tokenizer.json. [default: that of --model's folder or run, else {TOKENIZER_DIR}]",
    ),
]
Images = Annotated[
    Path | None,
    typer.Option("--images", metavar="DIR|ZIP|TAR", help="Pictures of the rows: a folder, zip or tar, read in place."),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="NAME",
        help="Which split of a folder: train, validation, test, held_out, all. [default: train]",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps …")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def load(
    model: Path | None, vision_model: Path | None, tokenizer: Path | None, device: str, say: Callable[[str], None]
) -> LoadedModel:
    """The model that these options name. Whether it is there at all is found before torch is imported."""
    from minimind_v.core.formats.inputs import find_model

    weights = find_model(model, vision_model, tokenizer, say)
    from minimind_v.core.formats.load import load_model

    return load_model(weights, vision_model, tokenizer, device, say)
