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
from minimind_v.core.config.schema import one_of
from minimind_v.core.errors import UsageError
from minimind_v.core.export.targets import TARGETS
from minimind_v.core.outputs import check_weights


class Precision(str, Enum):
    """Types that weights can be stored in."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def convert(
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="NAME", help="; ".join(f"{name}: {target.help}" for name, target in TARGETS.items()) + "."
        ),
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
    from minimind_v.core.formats.request import ExportRequest
    from minimind_v.core.hub.sources import latest_model, weights_at

    one_of("to", to, TARGETS)
    target, precision, terminal = TARGETS[to], dtype.value if dtype else None, Terminal()
    _refuse_wrong_type(to, precision, quantize)
    if target.ending:  # of the weights alone
        source = weights_at(model) if model else latest_model(terminal.say)
    else:
        source = find_model(model, vision_model, tokenizer, terminal.say)
    path = out or _beside(source, target.ending or f"-{to}")
    if target.ending:
        check_weights(path, source, target.ending, overwrite)  # before torch is imported
    from minimind_v.core.export.folder import export

    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # as in `core/export/prove/worker.py`; heeded before torch is there
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: what is half-written goes
    request = ExportRequest(source, vision_model, tokenizer, precision, quantize)
    report = export(request, to, path, verify, overwrite)
    if json:
        terminal.json({"out": str(path), "kind": to} | (report.facts or {"verified": report.found if verify else None}))
        return
    if report.found:
        terminal.table(report.found)
    usual = "written, opened again and compared" if verify else "written, and not verified"
    terminal.say(f"{path}: {report.summary or usual}")


def _refuse_wrong_type(to: str, dtype: str | None, quantize: str | None) -> None:
    if quantize and not TARGETS[to].quantizes:
        raise UsageError(f"--quantize is for --to gguf; the type of --to {to} is given with --dtype")
    if dtype and TARGETS[to].quantizes:
        raise UsageError(f"the type of --to {to} is given with --quantize (f32, f16, bf16, q8_0 …), not with --dtype")


def _beside(source: Path, ending: str) -> Path:
    source = source.resolve() if source.name in ("", "..") else source
    return source.with_name((source.name if source.is_dir() else source.stem) + ending)
