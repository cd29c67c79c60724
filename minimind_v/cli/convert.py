"""`mmv convert`: write a model in the format of another program, and verify it."""

from __future__ import annotations

import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.command import advanced
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import UsageError
from minimind_v.core.paths import OUT_DIR
from minimind_v.core.wording import plural


class Format(str, Enum):
    """Formats of a model: a folder for another program (hf, gguf), or a weights file."""

    hf = "hf"
    gguf = "gguf"
    safetensors = "safetensors"
    pth = "pth"


class Precision(str, Enum):
    """Types of stored weights."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


FILES = ("safetensors", "pth")


def convert(
    to: Annotated[
        Format,
        typer.Option(
            "--to", help="hf: folder for transformers. gguf: folder for llama.cpp. safetensors, pth: weights file."
        ),
    ],
    model: options.Model = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE|DIR", help="The result. [default: beside the source, named after the format]"),
    ] = None,
    dtype: Annotated[
        Precision | None,
        advanced(help="Type of the weights. [default: that of the source]"),
    ] = None,
    quantize: Annotated[
        str | None,
        advanced(
            metavar="TYPE",
            help="Type of the gguf weights: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0. [default: f16]",
        ),
    ] = None,
    verify: Annotated[
        bool,
        advanced("--verify/--no-verify", help="Open the result with the other program and compare."),
    ] = True,
    overwrite: options.Overwrite = False,
    vision_model: options.VisionOfModel = None,
    tokenizer: options.TokenizerOfModel = None,
    json: options.Json = False,
) -> None:
    """Write a model in another format and verify it. A result that differs is removed."""
    from minimind_v.core.formats.inputs import find_model
    from minimind_v.core.hub.sources import latest_model, weights_at

    precision = dtype.value if dtype else None
    _refuse_wrong_type(to, precision, quantize)
    if to.value in FILES:
        source = weights_at(model) if model else latest_model(Terminal().say, options.folder("out", OUT_DIR))
        _to_file(source, out or _beside(source, f".{to.value}"), to.value, precision, overwrite, json)
        return
    source = find_model(model, vision_model, tokenizer, Terminal().say, options.folder("out", OUT_DIR))
    from minimind_v.core.export.folder import export
    from minimind_v.core.formats.request import ExportRequest

    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # as in `core/export/prove/worker.py`; torch reads it when it is imported
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: partial results are removed
    target = out or _beside(source, f"-{to.value}")
    request = ExportRequest(source, vision_model, tokenizer, precision, quantize)
    report = export(request, to.value, target, verify, overwrite)
    terminal = Terminal()
    if json:
        terminal.json({"out": str(target), "kind": to.value, "verified": report.found if verify else None})
        return
    if verify:
        terminal.table(report.found)
    terminal.say(f"{target}: {'written and verified' if verify else 'written, not verified'}")


def _refuse_wrong_type(to: Format, dtype: str | None, quantize: str | None) -> None:
    if quantize and to is not Format.gguf:
        raise UsageError(f"--quantize is for --to gguf — use --dtype for the type of --to {to.value}")
    if dtype and to is Format.gguf:
        raise UsageError("--dtype is not for --to gguf — use --quantize (f32, f16, bf16, q8_0 …)")


def _beside(source: Path, ending: str) -> Path:
    source = source.resolve() if source.name in ("", "..") else source
    return source.with_name((source.name if source.is_dir() else source.stem) + ending)


def _to_file(source: Path, target: Path, to: str, dtype: str | None, overwrite: bool, json: bool) -> None:
    from minimind_v.core.outputs import check_weights

    check_weights(target, source, to, overwrite)  # before torch is imported
    from minimind_v.core.formats.convert_file import convert as run

    result = run(source, target, to, dtype, overwrite)
    terminal = Terminal()
    if json:
        terminal.json({
            "out": str(result.path), "kind": to, "tensors": result.tensors, "bytes": result.bytes,
            "largest_difference": result.difference,
        })  # fmt: skip
        return
    terminal.say(
        f"{result.path}: {plural(result.tensors, 'tensor')}, {result.bytes:,} bytes; read back; "
        f"largest difference {result.difference:g}"
    )
