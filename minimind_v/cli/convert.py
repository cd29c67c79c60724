"""`mmv convert`: the same model for other programs, proven the same."""

from __future__ import annotations

import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import UsageError
from minimind_v.core.wording import plural


class Format(str, Enum):
    """What a model can be written as: a folder with all that it takes, or a file of its weights."""

    hf = "hf"
    gguf = "gguf"
    safetensors = "safetensors"
    pth = "pth"


class Precision(str, Enum):
    """Types that weights can be stored in."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


FILES = ("safetensors", "pth")


def convert(
    to: Annotated[
        Format,
        typer.Option("--to", help="hf: a folder for transformers; gguf: one for llama.cpp; else a weights file."),
    ],
    model: options.Model = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE|DIR", help="[default: beside the source, with the format in its name]")
    ] = None,
    dtype: Annotated[Precision | None, typer.Option(help="[default: as in the source]")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Of gguf: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0. [default: f16]"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Open what was written as its users would, and compare.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier conversion wrote.")] = False,
    vision_model: options.VisionOfModel = None,
    tokenizer: options.TokenizerOfModel = None,
    json: options.Json = False,
) -> None:
    """Write a model for other programs, and prove it the same: nothing that differs is left standing."""
    from minimind_v.core.formats.inputs import find_model
    from minimind_v.core.hub.sources import latest_model, weights_at

    precision = dtype.value if dtype else None
    _refuse_wrong_type(to, precision, quantize)
    if to.value in FILES:
        source = weights_at(model) if model else latest_model(Terminal().say)
        _to_file(source, out or _beside(source, f".{to.value}"), to.value, precision, overwrite, json)
        return
    source = find_model(model, vision_model, tokenizer, Terminal().say)
    from minimind_v.core.export.folder import export
    from minimind_v.core.formats.request import ExportRequest

    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # as in `core/export/prove/worker.py`; heeded before torch is there
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: what is half-written goes
    target = out or _beside(source, f"-{to.value}")
    order = ExportRequest(source, vision_model, tokenizer, precision, quantize)
    report = export(order, to.value, target, verify, overwrite)
    terminal = Terminal()
    if json:
        terminal.json({"out": str(target), "kind": to.value, "verified": report.found if verify else None})
        return
    if verify:
        terminal.table(report.found)
    terminal.say(f"{target}: {'written, opened again and compared' if verify else 'written, and not verified'}")


def _refuse_wrong_type(to: Format, dtype: str | None, quantize: str | None) -> None:
    if quantize and to is not Format.gguf:
        raise UsageError(f"--quantize is for --to gguf; the type of --to {to.value} is said with --dtype")
    if dtype and to is Format.gguf:
        raise UsageError("the type of --to gguf is said with --quantize (f32, f16, bf16, q8_0 …), not with --dtype")


def _beside(source: Path, ending: str) -> Path:
    source = source.resolve() if source.name in ("", "..") else source
    return source.with_name((source.name if source.is_dir() else source.stem) + ending)


def _to_file(source: Path, target: Path, to: str, dtype: str | None, overwrite: bool, json: bool) -> None:
    from minimind_v.core.outputs import check_weights

    check_weights(target, source, to, overwrite)  # before torch is imported
    from minimind_v.core.formats.convert_file import convert as run

    done = run(source, target, to, dtype, overwrite)
    terminal = Terminal()
    if json:
        terminal.json({
            "out": str(done.path), "kind": to, "tensors": done.tensors, "bytes": done.bytes,
            "largest_difference": done.difference,
        })  # fmt: skip
        return
    terminal.say(
        f"{done.path}: {plural(done.tensors, 'tensor')}, {done.bytes:,} bytes; read back and compared, "
        f"largest difference {done.difference:g}"
    )
