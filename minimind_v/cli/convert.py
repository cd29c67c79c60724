"""`mmv convert`: write a model in the format of another program, and verify it."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.command import FORMATS, advanced
from minimind_v.cli.terminal import Terminal
from minimind_v.core.config.schema import one_of
from minimind_v.core.errors import UsageError
from minimind_v.core.export.targets import TARGETS, Target
from minimind_v.core.outputs import check_weights
from minimind_v.core.paths import OUT_DIR
from minimind_v.core.signals import exits_on_sigterm


class Precision(str, Enum):
    """Types of stored weights."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def convert(
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="NAME",
            help=f"{FORMATS}.",
            autocompletion=options.complete(TARGETS),
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
    from minimind_v.core.formats.request import ExportRequest

    one_of("to", to, TARGETS)
    target, precision, terminal = TARGETS[to], dtype.value if dtype else None, Terminal()
    _refuse_wrong_type(to, precision, quantize)
    source = _find_source(target, model, vision_model, tokenizer, terminal)
    path = out or _beside(source, target.ending or f"-{to}")
    if target.ending:  # refused before torch is imported
        check_weights(path, source, target.ending, overwrite)
    from minimind_v.core.export.folder import export

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `core/export/prove/worker.py`, before torch is imported
    request = ExportRequest(source, vision_model, tokenizer, precision, quantize)
    with exits_on_sigterm():  # partial results are removed
        report = export(request, to, path, verify, overwrite)
    if json:
        terminal.json(
            {"out": str(path), "kind": to} | (report.facts or {"verified": report.findings if verify else None})
        )
        return
    if report.findings:
        terminal.table(report.findings)
    terminal.say(f"{path}: {report.summary or ('written and verified' if verify else 'written, not verified')}")


def _find_source(
    target: Target, model: Path | None, vision_model: Path | None, tokenizer: Path | None, terminal: Terminal
) -> Path:
    """The weights to convert. Raises MissingInput for all missing inputs of the target."""
    from minimind_v.core.formats.inputs import find_model
    from minimind_v.core.hub.sources import latest_model, weights_at

    out_dir = options.folder("out", OUT_DIR)
    if target.ending:  # it holds the weights alone
        return weights_at(model) if model else latest_model(terminal.say, out_dir)
    return find_model(model, vision_model, tokenizer, terminal.say, out_dir)


def _refuse_wrong_type(to: str, dtype: str | None, quantize: str | None) -> None:
    if quantize and not TARGETS[to].quantizes:
        raise UsageError(f"--quantize is for --to gguf — use --dtype for the type of --to {to}")
    if dtype and TARGETS[to].quantizes:
        raise UsageError(f"--dtype is not for --to {to} — use --quantize (f32, f16, bf16, q8_0 …)")


def _beside(source: Path, ending: str) -> Path:
    source = source.resolve() if source.name in ("", "..") else source
    return source.with_name((source.name if source.is_dir() else source.stem) + ending)
