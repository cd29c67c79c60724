"""What a run says of itself: what it is about to do, which rows it leaves out, and what ended it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.dataset import BrokenRow
from minimind_v.core.data.loader import BatchPlan
from minimind_v.core.errors import DataError, RunError
from minimind_v.core.model.vlm import VLM

TOLD = 5  # broken rows that are told one by one
NAMED = 8  # rows of an update that are named


def announcement(config: RunConfig, plan: BatchPlan, updates: int, rows: int, model: VLM, where: str) -> str:
    """What is about to happen: so many updates of so many rows each."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vision_encoder."))
    return (
        f"{config.stage}: {len(plan.dataset):,} rows of {config.data.file}, {config.epochs} epochs, "
        f"{updates:,} updates of {rows} rows on {where}; "
        f"{trained:,} of {everything:,} parameters learn ({config.freeze})"
    )


def not_finite(loss: float, grad_norm: float, places: Sequence[str]) -> str:
    """An update that was skipped, and the rows that it was made of."""
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return f"loss {loss:g}, gradient norm {grad_norm:g}: skipped; its rows: {', '.join(places[:NAMED])}{more}"


def note_broken(
    known: dict[str, str], found: list[BrokenRow], rows: int, allowed: float, warn: Callable[[str], None]
) -> None:
    """Add rows that were left out to those that are known, by place, and tell of the first ones.

    Raises DataError where more than the share `allowed` of all `rows` are broken.
    """
    for row in found:
        if row.place in known:
            continue
        known[row.place] = str(row)
        if len(known) <= TOLD:
            warn(f"row skipped: {row}")
    if len(known) > allowed * rows:
        raise DataError(
            f"{len(known)} of {rows} rows are broken, more than {allowed:.0%}; "
            f"the first: {next(iter(known.values()))} — mend the data, or allow more with --set data.bad_rows=0.1"
        )


@contextmanager
def explained(config: RunConfig) -> Iterator[None]:
    """Turn what torch raises for want of memory into words with a next step."""
    try:
        yield
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one; a CPU's allocator has none of its own
        if not out_of_memory(error):
            raise
        batch, accumulate = config.data.batch_size, config.accumulate
        half = next((size for size in range(batch // 2, 0, -1) if batch % size == 0), 0)
        advice = f"the same recipe with less: --batch-size {half} --accumulate {accumulate * batch // max(half, 1)}"
        if not half:
            advice = f"lower --max-length {config.data.max_length}, or take a smaller --preset"
        raise RunError(f"out of memory — {advice}") from None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that there is no memory left, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
