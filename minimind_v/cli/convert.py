"""`mmv convert`: the same weights in another file format."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal


class Format(str, Enum):
    """What a checkpoint can be written as."""

    safetensors = "safetensors"
    pth = "pth"


class Precision(str, Enum):
    """Types that weights can be stored in."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def convert(
    to: Annotated[Format, typer.Option("--to", help="File format to write.")],
    model: options.Model = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="[default: beside the source, with the new ending]")
    ] = None,
    dtype: Annotated[Precision | None, typer.Option(help="[default: as in the source]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write a checkpoint as safetensors or pth, under the published names, and prove it the same."""
    from minimind_v.core.export.files import convert as run
    from minimind_v.core.generate.load import find_weights
    from minimind_v.core.hub.sources import OUT_DIR

    source = model or find_weights(OUT_DIR)
    target = out or source.with_suffix(f".{to.value}")
    done = run(source, target, to.value, dtype.value if dtype else None, overwrite)
    Terminal().say(
        f"{done.path}: {done.tensors} tensors, {done.bytes:,} bytes; read back and compared, "
        f"largest difference {done.difference:g}"
    )
