"""What a run says of itself: what it is about to do, which rows it leaves out, and what ended it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.dataset import BrokenRow
from minimind_v.core.data.loader import LANES, WINDOW, BatchPlan
from minimind_v.core.errors import DataError, RunError
from minimind_v.core.model.vlm import VLM

TOLD = 5  # broken rows that are told one by one
FEW = 50  # broken rows that no rate is judged by
NAMED = 8  # rows of an update that are named
# What torch says that has no error of its own for it, and what becomes of a failed allocation inside CUDA's libraries.
NO_MEMORY = (
    "can't allocate memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


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


class BrokenRows:
    """The rows of a run that were left out, each counted once however often it is met."""

    def __init__(self, rows: int, rows_per_update: int, allowed: float) -> None:
        """`allowed` is the share of all `rows` that may be broken."""
        self.rows, self.rows_per_update, self.allowed = rows, rows_per_update, allowed
        self.known: dict[str, list[str]] = {}  # by place: the kind and the whole message

    @property
    def kinds(self) -> dict[str, int]:
        """How many there are of each kind, the most frequent first."""
        return dict(Counter(kind for kind, _ in self.known.values()).most_common())

    @property
    def first(self) -> str | None:
        """What is wrong with the first one."""
        return next((message for _, message in self.known.values()), None)

    def add(self, found: list[BrokenRow], read: int, warn: Callable[[str], None]) -> None:
        """Take in broken rows when so many rows of the set have been `read`, and name the first ones.

        Raises DataError where too many of all rows are broken, or so many of those read that the rest hardly matters.
        It depends on nothing else, so it is the same after a resume and for any number of processes.
        """
        for row in found:
            if row.place in self.known:
                continue
            self.known[row.place] = [row.kind, str(row)]
            if len(self.known) <= TOLD:
                warn(f"row skipped: {row}")
        broken = len(self.known)
        if broken > self.allowed * self.rows:
            share = f"{broken} of {self.rows} rows are broken"
        elif broken > self._bearable(read):
            share = f"{broken} of the first {read} rows that were read are broken"
        else:
            return
        # Where no row was whole there is nothing to allow.
        more = f", or allow more with --set data.bad_rows={_above(broken / read):g}" if broken < read else ""
        raise DataError(
            f"{share}, more than {self.allowed:.0%}; the first: {self.first} — mend the data (`mmv data check` names "
            f"every such row){more}"
        )

    def _bearable(self, read: int) -> float:
        """Broken rows that `read` rows may have where the share of all is within what is allowed.

        Broken rows of a window come together, since it is sorted by length, and windows are read in lanes side by
        side. So those seen so far are set against all rows of the windows that have been begun, and beyond that count
        five standard deviations and a few rows are left to chance.
        """
        begun = min(read + LANES * WINDOW * self.rows_per_update, self.rows)
        return self.allowed * begun + 5 * math.sqrt(self.allowed * begun) + FEW


def _above(share: float) -> float:
    """A round share above this one."""
    return next((round_share for round_share in (0.02, 0.05, 0.1, 0.2, 0.5) if round_share > share), 1.0)


@contextmanager
def explained(config: RunConfig, plan: BatchPlan) -> Iterator[None]:
    """Turn what torch raises for want of memory, or over a dead data worker, into words with a next step."""
    try:
        yield
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        if dead := re.search(r"DataLoader worker \(pid\(?s?\)? ?(\d+)", str(error)):
            place = plan.read_by(int(dead[1]))
            raise RunError(
                f"a data worker died{f' at {place}' if place else ''} — look at that row, or, where memory is short, "
                f"try --workers 0 ({error})"
            ) from None
        if not out_of_memory(error):
            raise
        batch, accumulate = config.data.batch_size, config.accumulate
        half = next((size for size in range(batch // 2, 0, -1) if batch % size == 0), 0)
        advice = f"the same recipe with less: --batch-size {half} --accumulate {accumulate * batch // max(half, 1)}"
        if not half:
            advice = f"lower --max-length {config.data.max_length}, or take a smaller --preset"
        raise RunError(f"out of memory — {advice}") from None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, or a library that it calls, says that there is no memory left, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)
