"""`mmv bench`: how fast this machine is, and what holds it up."""

from __future__ import annotations

from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal


def bench(
    preset: Annotated[str, typer.Option(help="small, base, moe or demo.")] = "small",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Measure this machine in under a minute: matrices, pictures, training, answers. Needs no downloads."""
    from dataclasses import asdict

    from minimind_v.core.config.presets import check_preset

    check_preset(preset)
    from minimind_v.core.bench import bench as measure

    terminal = Terminal()
    found = measure(preset, device, lambda what: terminal.say(f"{what} …"))
    if json:
        terminal.json(asdict(found))
        return
    terminal.table({
        "machine": f"{found.device}, {found.threads} threads, {found.dtype}; preset {found.preset}",
        "matrices": f"{found.matmul_gflops:,.0f} GFLOP/s",
        "looking": f"{found.clip_pictures:.4g} pictures/s",
        "decoding": f"{found.decoded_pictures:.4g} pictures/s in each of {found.data_workers} workers",
        "pretraining": f"{found.samples_first_epoch:.3g} samples/s in the first epoch, "
        f"{found.samples_later:.3g} with features remembered ({found.matmul_share:.0%} of the matrices' rate)",
        "answering": f"first token after {found.first_token_seconds:.2f} s, then {found.tokens:.3g} tokens/s",
        "limit": found.limit,
    })  # fmt: skip
