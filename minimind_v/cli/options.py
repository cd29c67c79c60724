"""Options that several commands share, and the environment variables that stand for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli.command import advanced, output
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.errors import UsageError
from minimind_v.core.extensions import load_extensions
from minimind_v.core.paths import OUT_DIR, TOKENIZER_DIR, VISION_DIR

if TYPE_CHECKING:
    from minimind_v.core.formats.load import LoadedModel

# The variable that gives an option its value where the command line does not. An empty one counts as unset.
ENVIRONMENT = {
    "out": "MMV_OUT",
    "data": "MMV_DATA",
    "vision_model": "MMV_VISION_MODEL",
    "tokenizer": "MMV_TOKENIZER",
    "model": "MMV_MODEL",
    "device": "MMV_DEVICE",
}

Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="FILE|DIR",
        envvar=ENVIRONMENT["model"],
        help="Weights (.pth, .safetensors), a run's folder or an exported folder. "
        "[default: the latest in ./out, else the demo's]",
    ),
]


def _folder(option: str, variable: str, help: str) -> Any:
    return advanced(option, metavar="DIR", envvar=ENVIRONMENT[variable], help=help)


VisionOfRows = Annotated[
    Path | None,
    _folder(
        "--vision-model",
        "vision_model",
        f"Folder of the vision encoder. [default: that of --preset, {VISION_DIR}; without it, the preset's sizes]",
    ),
]
TokenizerOfRows = Annotated[
    Path | None,
    _folder("--tokenizer", "tokenizer", f"Folder of tokenizer.json. [default: that of --preset, {TOKENIZER_DIR}]"),
]
# The same beside --model, which may be a folder that has both.
VisionOfModel = Annotated[
    Path | None,
    _folder(
        "--vision-model",
        "vision_model",
        f"Folder of the vision encoder. [default: that of --model's folder or run, else {VISION_DIR}]",
    ),
]
TokenizerOfModel = Annotated[
    Path | None,
    _folder(
        "--tokenizer",
        "tokenizer",
        f"Folder of tokenizer.json. [default: the one recorded with --model, else {TOKENIZER_DIR}]",
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images", metavar="DIR|ZIP|TAR", help="Images of the rows: a folder, zip or tar; nothing is unpacked."
    ),
]
Split = Annotated[
    str | None,
    advanced(
        "--split", metavar="NAME", help="Split of a folder: train, validation, test, held_out or all. [default: train]"
    ),
]
Device = Annotated[
    str,
    advanced("--device", metavar="NAME", envvar=ENVIRONMENT["device"], help="auto, cpu, cuda, cuda:1, mps …"),
]
Json = Annotated[bool, output("--json", help="Print one JSON object and nothing else on stdout.")]
Overwrite = Annotated[bool, advanced("--overwrite", help="Replace existing files.")]


def complete(choices: Iterable[str]) -> Callable[[str], Iterable[str]]:
    """The shell completion of an option with these values, those of extensions among them."""

    def completed(incomplete: str) -> list[str]:
        with suppress(UsageError):
            load_extensions()
        return [choice for choice in choices if choice.startswith(incomplete)]

    return completed


PresetOfRows = Annotated[
    str | None,
    advanced(
        "--preset",
        metavar="NAME",
        help="Model size: its tokenizer and vision encoder read the rows. [default: small, or the generation of "
        "--tokenizer]",
        autocompletion=complete(PRESETS),
    ),
]


def folder(name: str, standard: Path) -> Path:
    """A folder for which a command has no option: that of its variable, else the standard one."""
    return Path(os.environ.get(ENVIRONMENT[name]) or standard)


def load(
    model: Path | None, vision_model: Path | None, tokenizer: Path | None, device: str, say: Callable[[str], None]
) -> LoadedModel:
    """The model that these options name. Raises MissingInput before torch is imported."""
    from minimind_v.core.formats.inputs import find_model

    weights = find_model(model, vision_model, tokenizer, say, folder("out", OUT_DIR))
    from minimind_v.core.formats.load import load

    return load(weights, vision_model, tokenizer, device, say)
