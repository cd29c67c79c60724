"""`mmv bench`: the speed of this machine, and what limits it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.options import complete
from minimind_v.cli.terminal import Terminal
from minimind_v.core.config.presets import PRESETS, check_preset
from minimind_v.core.paths import STANDARD_PRESET


def bench(
    preset: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"Model size: {', '.join(PRESETS)}.", autocompletion=complete(PRESETS)),
    ] = STANDARD_PRESET,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Measure the speed of this machine in under a minute. It needs no downloads."""
    check_preset(preset)
    from minimind_v.core.bench import bench as measure

    terminal = Terminal()
    result = measure(preset, device, lambda name: terminal.say(f"{name} …"))
    if json:
        terminal.json(asdict(result))
        return
    terminal.table({
        "machine": f"{result.device}, {result.threads} threads, {result.dtype}; preset {result.preset}",
        "matrices": f"{result.matmul_gflops:,.0f} GFLOP/s",
        "encoding": f"{result.clip_pictures:.4g} images/s",
        "decoding": f"{result.decoded_pictures:.4g} images/s in each of {result.data_workers} workers",
        "pretraining": f"{result.samples_first_epoch:.3g} samples/s in the first epoch, "
        f"{result.samples_later:.3g} with cached features ({result.matmul_share:.0%} of the matrices' rate)",
        "generating": f"first token after {result.first_token_seconds:.2f} s, then {result.tokens:.3g} tokens/s",
        "limit": result.limit,
    })  # fmt: skip
