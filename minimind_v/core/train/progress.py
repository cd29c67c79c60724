"""The progress of a run: its counts, and reports about the rows of its steps, each kind of trouble once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.loader import BatchPlan
from minimind_v.core.errors import RunError
from minimind_v.core.monitor.messages import BrokenRows, not_finite
from minimind_v.core.monitor.metrics import Listener
from minimind_v.core.rows.row import NOTES, describe_notes, describe_text_rows
from minimind_v.core.train.distributed import World
from minimind_v.core.train.step import StepResult
from minimind_v.core.wording import plural

Total = Callable[[Sequence[float]], list[float]]  # numbers of this process → their sums over all processes

PATIENCE = 5  # steps in a row without a finite loss and gradient before a run ends


@dataclass
class Counts:
    """Sums over a run, its interruptions included."""

    samples: int = 0
    text_rows: int = 0  # rows with pictures that no mark shows, in the first epoch
    notes: dict[str, int] = field(default_factory=dict)  # rows read in another way than written, in the first epoch
    tokens: int = 0  # real ones, placeholders included
    supervised: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of these, for data
    skipped: int = 0  # steps in a row without a finite gradient
    bad: int = 0  # all of them
    right: int = 0  # steps in a row with every answer predicted right


@dataclass(frozen=True)
class StepRows:
    """The contents of one step's batches, over all processes."""

    supervised: int  # tokens
    rows: int
    tokens: int
    images: int
    text_rows: int
    notes: dict[str, int]


class Progress:
    """The progress of a run."""

    def __init__(self, config: RunConfig, plan: BatchPlan, listener: Listener, world: World) -> None:
        self.config, self.plan, self.listener, self.world = config, plan, listener, world
        self.done = 0  # steps
        self.counts = Counts()
        self.broken = BrokenRows(plan.rows, plan.rows_per_step, config.data.bad_rows)
        self._troubles: set[str] = set()  # of data workers, each reported once
        self._noted: set[str] = set()  # what was reported about rows, before it is counted

    def state(self) -> dict[str, Any]:
        """The fields of a resume state."""
        split = [self.config.data.batch_size, self.config.accumulate]
        counts, broken = asdict(self.counts), dict(self.broken.by_location)
        return {"step": self.done, "counts": counts, "broken": broken, "split": split}

    def restore(self, state: dict[str, Any]) -> None:
        self.done, self.broken.by_location = state["step"], state["broken"]
        self.counts = Counts(**state["counts"])

    def rows_read(self, step: int) -> int:
        """Rows of the set that were read until a step, each counted once."""
        return min(step * self.plan.rows_per_step, self.plan.rows)

    def count(self, step: int, fetched: list[Batch] | None, usable: list[Batch], total: Total) -> StepRows | None:
        """Count the micro-batches of a step and report their troubles; None where a process stopped before it had any.

        Raises DataError where too many rows are broken.
        """
        for batch in fetched or ():
            if batch.trouble and batch.trouble not in self._troubles:
                self._troubles.add(batch.trouble)
                self.listener.warning(batch.trouble)
        broken_rows = [row for batch in fetched or () for row in batch.broken]
        numbers = [
            fetched is None,
            len(broken_rows),
            sum(batch.supervised for batch in usable),
            sum(map(len, usable)),
            sum(int(batch.attention_mask.sum()) for batch in usable),
            sum(batch.images for batch in usable),
            sum(batch.text_rows for batch in usable),
            *(sum(batch.notes.get(note, 0) for batch in usable) for note in NOTES),
        ]
        stopped, broken, supervised, rows, tokens, images, text_rows, *noted = map(int, total(numbers))
        if stopped:
            return None
        if broken:
            everyone = [row for of_process in self.world.gather_objects(broken_rows) for row in of_process]
            self.broken.add(everyone, self.rows_read(step), self.listener.warning)
        notes = {note: count for note, count in zip(NOTES, noted, strict=True) if count}
        self._report_notes(step, rows, text_rows, notes)
        return StepRows(supervised, rows, tokens, images, text_rows, notes)

    def _report_notes(self, step: int, rows: int, text_rows: int, notes: dict[str, int]) -> None:
        """Report rows that are read in another way than written, each kind once."""
        lines = describe_notes(
            {note: notes[note] for note in notes.keys() - self.counts.notes.keys() - self._noted}, rows
        )
        if text_rows and not self.counts.text_rows and "" not in self._noted:
            lines.insert(0, describe_text_rows(text_rows, rows))
            self._noted.add("")
        self._noted |= notes.keys()
        for line in lines:
            self.listener.message(f"step {step}: {line}; further ones are only counted")

    def add(self, step: int, rows: StepRows, result: StepResult) -> None:
        """Count a finished step."""
        counts = self.counts
        counts.samples += rows.rows
        counts.supervised += rows.supervised
        counts.tokens += rows.tokens
        if step <= self.plan.steps_per_epoch:
            counts.text_rows += rows.text_rows
            counts.notes = dict(Counter(counts.notes) + Counter(rows.notes))
        counts.right = counts.right + 1 if result.correct == rows.supervised else 0

    def check_finite(self, step: int, result: StepResult, batches: list[Batch], steps: int) -> None:
        """Report a step that changed no weight. Raises RunError after a few of them in a row, of a run of `steps`."""
        if result.finite:
            self.counts.skipped = 0
            return
        self.counts.skipped += 1
        self.counts.bad += 1
        losses = zip(batches, result.batch_losses, strict=False)
        worst = [batch for batch, loss in losses if not math.isfinite(loss)] or batches
        of_processes = self.world.gather_objects([row for batch in worst for row in batch.locations])
        suspects = [row for rows in of_processes for row in rows]
        self.listener.warning(f"step {step}: {not_finite(result.loss, result.grad_norm, suspects)}")
        if self.counts.skipped == min(PATIENCE, steps):
            raise RunError(
                f"{plural(self.counts.skipped, 'step')} in a row without a finite loss — lower --lr, or check "
                "the rows above"
            )
