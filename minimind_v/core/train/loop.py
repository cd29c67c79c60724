"""The one training loop: it takes batches from a plan, makes steps, and reports them. Its parts are handed to it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

from minimind_v.core.config.schedule import learning_rate
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.loader import BatchPlan, load_steps
from minimind_v.core.errors import DataError, RunError
from minimind_v.core.monitor.messages import BrokenRows, announcement, before_the_start, explained, not_finite
from minimind_v.core.monitor.metrics import Listener, StepMetrics, Validation
from minimind_v.core.rows.row import NOTES, describe_notes, describe_text_rows
from minimind_v.core.signals import StopRequest
from minimind_v.core.train.distributed import ALONE, World
from minimind_v.core.train.recall import RecallReport
from minimind_v.core.train.records import Records
from minimind_v.core.train.resume import State, named_trainable, unpack
from minimind_v.core.train.run_folder import RunFolder
from minimind_v.core.train.saver import Saver
from minimind_v.core.train.step import StepResult, TrainStep
from minimind_v.core.train.validate import Validator
from minimind_v.core.wording import plural

RIGHT_EPOCHS = 2  # after one, its own last steps had unlearnt an answer to one of twelve rows
PATIENCE = 5  # steps in a row without a finite loss and gradient before a run is given up


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    weights: Path
    metrics: Path
    steps: int
    stopped_by: Signals | None  # None: it came to its end
    broken_rows: dict[str, int]  # by kind
    text_rows: int  # rows with pictures that no mark shows, of
    notes: dict[str, int]  # rows that are read in another way than they are written, of
    rows: int  # of the set that were read
    bad_steps: int  # skipped, since loss or gradient was not finite


@dataclass
class Counts:
    """What adds up over a run, also over one that is resumed."""

    samples: int = 0
    text_rows: int = 0  # rows with pictures that no mark shows, in the first epoch
    notes: dict[str, int] = field(default_factory=dict)  # rows read in another way than written, in the first epoch
    tokens: int = 0  # real ones, placeholders included
    supervised: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of these, for data
    skipped: int = 0  # steps in a row without a finite gradient
    bad: int = 0  # all of them
    right: int = 0  # steps in a row in which every answer was predicted right


@dataclass(frozen=True)
class StepCounts:
    """What the batches of one step hold, over all processes."""

    waiting: int  # processes that were stopped before their batches came
    supervised: int  # tokens
    rows: int
    tokens: int
    text_rows: int
    broken: int
    notes: dict[str, int]


@dataclass
class Run:
    """The training loop over its parts. The leading process alone has a saver, records and a recall report."""

    config: RunConfig
    plan: BatchPlan
    train_step: TrainStep
    listener: Listener
    world: World = ALONE
    validator: Validator | None = None
    saver: Saver | None = None
    records: Records | None = None
    recall: RecallReport | None = None

    def __post_init__(self) -> None:
        self.total = min(len(self.plan), self.config.max_steps or len(self.plan))
        self.broken = BrokenRows(self.plan.rows, self.plan.rows_per_step, self.config.data.bad_rows)
        self.troubles: set[str] = set()  # of data workers, each reported once
        self.done = 0  # steps
        self.best: Validation | None = None
        self.stopped_by: Signals | None = None
        self.counts = Counts()

    def resume(self, state: State) -> None:
        """Continue from a state, bit for bit as if the run had never been interrupted."""
        unpack(state.tensors, named_trainable(self.train_step.model), self.train_step.optimiser)
        self.done = state.progress["step"]
        self.counts = Counts(**state.progress["counts"])
        self.broken.by_place = state.progress["broken"]
        self._end_if_right(self.done)
        self.listener.message(f"resuming after step {self.done} of {self.total}, from {state.path}")

    def run(self) -> Summary:
        """Train to the end, or until a signal asks to stop; both save."""
        if self.done >= self.total:
            self.listener.message("this run is complete")
            return self._summary()
        begun, torn = self.done, False
        self.best = self.records.open(begun) if self.records else None
        self.train_step.model.train()
        self._announce()
        if self.recall:
            self.recall.before(begun)
        self._clock = time.perf_counter() - self.counts.seconds
        with (
            closing(self.listener),
            StopRequest() as self.stop,
            explained(self.config),
            closing(self.records) if self.records else nullcontext(),
        ):
            try:
                self._loop()
            except KeyboardInterrupt:  # a second signal, perhaps in the middle of a step
                torn = True
                raise
            finally:
                self._end(save=self.done > begun and bool(self.counts.supervised) and not torn)
        if not self.counts.supervised and not self.stopped_by:
            trouble = self.broken.first or "every answer is cut off"
            raise DataError(f"{self.config.data.file}: no row could be used; the first trouble: {trouble}")
        return self._summary()

    def _loop(self) -> None:
        config = self.config
        for step, batches in enumerate(self._batches(), self.done + 1):
            metrics = self._step(step, batches)
            if metrics is None:  # asked to stop before there was data
                return
            self.done = step
            logged = step % config.log_every == 0 or step in (1, self.total)
            if logged and self.records:
                self.records.log(metrics)
            self.listener.step(metrics, logged)
            if self.validator and (step % config.val_every == 0 or step == self.total):
                self._validate(self.validator, step)
            if self.saver and step < self.total:
                self.saver.after_step(step, logged, self._progress)
            if self.world.size == 1:  # several must stop after the same step
                self.stopped_by = self.stop.signal
            if self.stopped_by or step == self.total:
                return

    def _end(self, save: bool) -> None:
        """Save what was learnt and write the records, after the save that may still run."""
        if self.saver:
            self.saver.report(wait=True)
            if save:
                self.saver.save_now(self._progress())
        if self.records and save:
            self.records.restore(self.done)
            if self.recall and self.done >= self.total:
                self.recall.after()
            self.records.report()

    def _batches(self) -> Iterator[list[Batch] | None]:
        """The micro-batches of each step that fall to this process, fetched when they are needed.

        None, as the last ones, where a signal asked to stop while they were waited for.
        """
        pin, workers = self.train_step.model.device.type == "cuda", self.config.data.workers
        with closing(load_steps(self.plan, workers, pin, self.done, self.listener.warning)) as steps:
            for _ in range(self.done, len(self.plan)):
                asked = time.perf_counter()
                batches = self.stop.wait(partial(next, steps))
                self.counts.waited += time.perf_counter() - asked
                yield batches

    def _step(self, step: int, fetched: list[Batch] | None) -> StepMetrics | None:
        """One step over all processes; None, and no step, where one was stopped before it had its batches."""
        self._report_troubles(fetched or [])
        self.listener.batches(fetched or [])
        broken = [row for batch in fetched or () for row in batch.broken]
        batches = [batch for batch in fetched or () if batch.supervised]
        found = self._count(batches, len(broken), waiting=fetched is None)
        if found.waiting:
            return None
        if found.broken:
            everyone = [row for rows in self.world.gather_objects(broken) for row in rows]
            self.broken.add(everyone, self._rows_read(step), self.listener.warning)
        self._report_notes(step, found)
        lr = learning_rate(step - 1, self.total, self.config.lr)
        result = self.train_step(batches, found.supervised, found.rows, lr, self._total)
        if found.supervised:
            self._check_finite(step, result, batches)
        self._add(step, found, result)
        self._end_if_right(step)
        counts, epoch = self.counts, round(step / self.plan.steps_per_epoch, 4)
        accuracy = result.correct / max(found.supervised, 1)
        return StepMetrics(
            step, self.total, epoch, result.loss, accuracy, lr, result.grad_norm, counts.samples, counts.tokens,
            counts.supervised, counts.seconds, counts.waited,
        )  # fmt: skip

    def _total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all processes; that one was asked to stop travels with them, so that all stop together."""
        *columns, signals = zip(*self.world.gather([*numbers, self.stop.signal or 0]), strict=True)
        if any(signals):
            self.stopped_by = Signals(int(max(signals)))
        return [sum(column) for column in columns]

    def _count(self, batches: list[Batch], broken: int, waiting: bool) -> StepCounts:
        numbers = [
            waiting,
            sum(batch.supervised for batch in batches),
            sum(map(len, batches)),
            sum(int(batch.attention_mask.sum()) for batch in batches),
            sum(batch.text_rows for batch in batches),
            broken,
            *(sum(batch.notes.get(note, 0) for batch in batches) for note in NOTES),
        ]
        stopped, supervised, rows, tokens, text_rows, broken, *noted = map(int, self._total(numbers))
        notes = {note: count for note, count in zip(NOTES, noted, strict=True) if count}
        return StepCounts(stopped, supervised, rows, tokens, text_rows, broken, notes)

    def _add(self, step: int, found: StepCounts, result: StepResult) -> None:
        counts = self.counts
        counts.samples += found.rows
        counts.supervised += found.supervised
        counts.tokens += found.tokens
        if step <= self.plan.steps_per_epoch:
            counts.text_rows += found.text_rows
            counts.notes = dict(Counter(counts.notes) + Counter(found.notes))
        counts.right = counts.right + 1 if result.correct == found.supervised else 0
        counts.seconds = time.perf_counter() - self._clock

    def _end_if_right(self, step: int) -> None:
        """End the run with this step where whole epochs of right answers are behind it and no more is asked for."""
        epoch = self.plan.steps_per_epoch
        if self.config.until_right and step % epoch == 0 and self.counts.right >= RIGHT_EPOCHS * epoch:
            self.total = step

    def _check_finite(self, step: int, result: StepResult, batches: list[Batch]) -> None:
        """Report a step that changed no weight. Raises RunError after a few of them in a row."""
        if result.finite:
            self.counts.skipped = 0
            return
        self.counts.skipped += 1
        self.counts.bad += 1
        pairs = zip(batches, result.batch_losses, strict=False)
        worst = [batch for batch, loss in pairs if not math.isfinite(loss)] or batches
        places = self.world.gather_objects([place for batch in worst for place in batch.places])
        rows = [place for process in places for place in process]
        self.listener.warning(f"step {step}: {not_finite(result.loss, result.grad_norm, rows)}")
        if self.counts.skipped == min(PATIENCE, self.total):
            raise RunError(
                f"{plural(self.counts.skipped, 'step')} in a row without a finite loss — lower --lr, or look at "
                "the rows above"
            )

    def _validate(self, validator: Validator, step: int) -> None:
        """Measure the held-out rows, and keep the weights where they have never been better."""
        result = validator(self.train_step.model, self.train_step.features.features, step, self.best)
        if result is None:
            return
        self.best = result if result.best else self.best
        self.listener.validated(result)
        if result.best and self.saver:
            self.saver.save_best(step)

    # --- what is reported ---------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        config, kind = self.config, self.train_step.model.device
        where = str(kind) if self.world.size == 1 else f"{self.world.size} processes ({kind.type})"
        rows = self.plan.rows_per_step
        about = announcement(config, self.plan, self.total, rows, self.train_step.model, where)
        self.listener.message(f"{about}; weights go to {RunFolder(config).weights}")
        if not self.done:
            for line in before_the_start(config, self.plan, self.total):
                self.listener.warning(line)

    def _report_troubles(self, batches: list[Batch]) -> None:
        for trouble in {batch.trouble: None for batch in batches if batch.trouble}:
            if trouble not in self.troubles:
                self.troubles.add(trouble)
                self.listener.warning(trouble)

    def _report_notes(self, step: int, found: StepCounts) -> None:
        """Report which rows are read in another way than they are written, of each kind the first ones."""
        kinds: Mapping[str, int] = {note: found.notes[note] for note in found.notes.keys() - self.counts.notes.keys()}
        lines = describe_notes(kinds, found.rows)
        if found.text_rows and not self.counts.text_rows:
            lines.insert(0, describe_text_rows(found.text_rows, found.rows))
        for line in lines:
            self.listener.message(f"step {step}: {line}; from here on they are only counted")

    def _progress(self) -> dict[str, Any]:
        """What a state keeps besides tensors, to resume from it."""
        split = [self.config.data.batch_size, self.config.accumulate]
        return {
            "step": self.done, "counts": asdict(self.counts), "broken": dict(self.broken.by_place), "split": split,
        }  # fmt: skip

    def _rows_read(self, step: int) -> int:
        """Rows of the set that were read until a step, each counted once."""
        return min(step * self.plan.rows_per_step, self.plan.rows)

    def _summary(self) -> Summary:
        folder, counts = RunFolder(self.config), self.counts
        rows = (self.broken.kinds, counts.text_rows, counts.notes, self._rows_read(self.done))
        return Summary(folder.weights, folder.metrics, self.done, self.stopped_by, *rows, counts.bad)
