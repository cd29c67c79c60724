"""The training loop: it takes batches from a plan, does steps, and reports them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING

from minimind_v.core.config.generation import generation_of
from minimind_v.core.config.recipes import NO_INIT
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.loader import BatchPlan, load_steps
from minimind_v.core.data.vision_stage import encode_ahead
from minimind_v.core.errors import DataError, MmvError
from minimind_v.core.monitor.messages import BrokenRows, announcement, before_the_start, explained
from minimind_v.core.monitor.metrics import Best, Listener, StepMetrics
from minimind_v.core.signals import StopRequest
from minimind_v.core.train.distributed import ALONE, World
from minimind_v.core.train.progress import Progress, StepRows
from minimind_v.core.train.recall import RecallReport, recall_own
from minimind_v.core.train.records import Records
from minimind_v.core.train.resume import State, named_trainable, unpack
from minimind_v.core.train.run_folder import RunFolder
from minimind_v.core.train.saver import Saver
from minimind_v.core.train.step import PendingStep, TrainStep
from minimind_v.core.train.validate import Validator
from minimind_v.core.wording import plural

if TYPE_CHECKING:
    from minimind_v.core.train.evaluator import Evaluator

MOST_TO_CHECK = 2000  # rows, which stay in memory, before the first step
ROWS_TO_CHECK = 200  # all of a small set, some 0.1 seconds
RIGHT_EPOCHS = 2  # after one epoch, later steps had made one of twelve answers wrong again


@dataclass(frozen=True)
class Summary:
    """The end of a run."""

    weights: Path  # those it started from, where there was nothing to learn
    best_weights: Path | None  # None: the run kept none
    metrics: Path
    steps: int
    stopped_by: Signals | None  # None: the run reached its end
    broken_rows: dict[str, int]  # by kind
    text_rows: int  # rows with pictures that no mark shows, of
    notes: dict[str, int]  # rows that are read in another way than they are written, of
    rows: int  # of the set that were read
    bad_steps: int  # skipped, since loss or gradient was not finite
    best: Best | None  # of the weights in `best_weights`


@dataclass(frozen=True)
class Launched:
    """A step that is launched, and what its report needs besides its result."""

    number: int
    batches: list[Batch]
    rows: StepRows
    lr: float
    step: PendingStep


@dataclass
class Run:
    """A run, ready to train. The leading process alone has a saver, records, a recall report and an evaluator."""

    config: RunConfig
    plan: BatchPlan
    train_step: TrainStep
    listener: Listener
    world: World = ALONE
    validator: Validator | None = None
    saver: Saver | None = None
    records: Records | None = None
    recall: RecallReport | None = None
    evaluator: Evaluator | None = None
    unsaid: list[str] = field(default_factory=list)  # warnings of this process for the leading one to report

    def __post_init__(self) -> None:
        self.total = min(len(self.plan), self.config.max_steps or len(self.plan))
        self.progress = Progress(self.config, self.plan, self.listener, self.world)
        self.best: Best | None = None
        self.stopped_by: Signals | None = None
        self._launched: Launched | None = None  # the last step, until its result is read
        self._save_due = False  # after that step

    def resume(self, state: State) -> None:
        """Continue from a state, bit for bit as if the run had never been interrupted."""
        unpack(state.tensors, named_trainable(self.train_step.model), self.train_step.optimiser)
        self.progress.restore(state.progress)
        self._end_if_right(self.progress.done)
        self.listener.message(f"resuming after step {self.progress.done} of {self.total}, from {state.path}")

    def run(self) -> Summary:
        """Train to the end, or until a signal; then save."""
        progress, begun = self.progress, self.progress.done
        if begun >= self.total:
            self.listener.message("this run is already finished")
            if self.saver:  # it may have ended between its state and its weights
                self.saver.write_weights()
            return self._summary()
        if not begun and self.records:
            self._check_rows()
        if not begun and (weights := self._right_already()):
            self.listener.message(
                f"nothing to learn: {weights} answers every row of {self.config.data.file} correctly "
                f"({plural(self.plan.rows, 'row')}), so no step is done and no weights are written"
            )
            return replace(self._summary(), weights=weights)
        self.best = self.records.open(begun) if self.records else None
        self.train_step.model.train()
        self._announce()
        if self.recall:
            self.recall.before(begun)
        self._clock = time.perf_counter() - progress.counts.seconds
        with (
            closing(self.listener),
            StopRequest() as self.stop,
            explained(self.config),
            closing(self.records) if self.records else nullcontext(),
        ):
            try:
                self._train(begun)
            except KeyboardInterrupt:  # a second signal
                if self.saver:
                    self.listener.lost(f"stopped at once — {self.saver.next_step()}")
                raise
        if not progress.counts.supervised and not self.stopped_by:
            trouble = progress.broken.first or "every answer is cut off"
            raise DataError(f"{self.config.data.file}: no row is usable; the first problem: {trouble}")
        return self._summary()

    def _train(self, begun: int) -> None:
        """Do all steps, and save however they end, but not in the middle of a step."""
        progress, torn = self.progress, False
        try:
            self._loop()
        except KeyboardInterrupt:
            torn = True
            raise
        finally:
            try:
                if not torn:
                    self._finish()
            finally:
                self._end(save=progress.done > begun and bool(progress.counts.supervised) and not torn)

    def _loop(self) -> None:
        begun = self.progress.done
        if self._evaluates_at(begun) and self.records and self.records.evaluated_step != begun:
            self._evaluate()  # before the first step, or where an interruption came before it
        self.world.await_leader()
        steps = encode_ahead(self._batches(), self.train_step.features)
        for step, batches in enumerate(steps, begun + 1):
            launched = self._launch(step, batches)
            self._finish()  # the step before, while a GPU does this one
            if launched is None:  # a signal came before the data
                return
            self._launched = launched
            if self.train_step.late and not self._is_stop(step):
                continue
            self._finish()
            if self.validator and self._validates(step):
                self._validate(self.validator, step)
            self._hear_signal()
            if self.stopped_by and step < self.total:  # an evaluation comes again after a resume
                return
            if self.saver and self._save_due:
                self.saver.save(step, self.progress.state())
            if self._evaluates_at(step):  # after the save, since it may take long
                self._evaluate()
                self.world.await_leader()
            self._hear_signal()
            if self.stopped_by or step >= self.total:
                return

    def _hear_signal(self) -> None:
        if self.world.size == 1:  # several must stop after the same step: they exchange signals
            self.stopped_by = self.stop.signal

    def _is_stop(self, step: int) -> bool:
        """Whether what follows a step needs its result and its weights, so that the next step may not be launched.

        All processes give the same answer: when they read a bad step, they exchange its rows.
        """
        ends_epoch = self.config.until_right and step % self.plan.steps_per_epoch == 0
        signal = self.stop.signal if self.world.size == 1 else self.stopped_by
        stops = step >= self.total or ends_epoch or signal is not None or self._save_due
        # After a bad step the next one may end the run, and must then be the last that was launched.
        stops = stops or self.progress.counts.skipped > 0
        return stops or self._validates(step) or self._evaluates_at(step)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step in (1, self.total)

    def _validates(self, step: int) -> bool:
        return self.validator is not None and (step % self.config.val_every == 0 or step == self.total)

    def _batches(self) -> Iterator[list[Batch] | None]:
        """The micro-batches of each step for this process, fetched when they are needed.

        The last is None if a signal came during the wait.
        """
        pin, workers = self.train_step.model.device.type == "cuda", self.config.data.workers
        done = self.progress.done
        with closing(load_steps(self.plan, workers, pin, done, self.listener.warning)) as steps:
            for _ in range(done, self.total):
                asked = time.perf_counter()
                batches = self.stop.wait(partial(next, steps))
                self.progress.counts.waited += time.perf_counter() - asked
                yield batches

    def _launch(self, step: int, fetched: list[Batch] | None) -> Launched | None:
        """Begin a step over all processes; None, without a step, if one was stopped before it had its batches."""
        self.listener.batches(fetched or [])
        batches = [batch for batch in fetched or () if batch.supervised]
        rows = self.progress.count(step, fetched, batches, partial(self._total, step))
        if rows is None:
            return None
        lr = generation_of(self.config.model).cosine.rate(step, self.total, self.config.lr)
        pending = self.train_step(batches, rows.supervised, rows.rows, lr, rows.images)
        return Launched(step, batches, rows, lr, pending)

    def _finish(self) -> None:
        """Read the result of the step that was launched last, if it has not been read, and report it."""
        launched, self._launched = self._launched, None
        if launched is None:
            return
        step, rows, result = launched.number, launched.rows, launched.step.result
        progress, counts = self.progress, self.progress.counts
        if rows.supervised:
            progress.check_finite(step, result, launched.batches, self.total)
        progress.add(step, rows, result)
        counts.seconds = time.perf_counter() - self._clock
        self._end_if_right(step)
        progress.done = step
        metrics = StepMetrics(
            step,
            self.total,
            round(step / self.plan.steps_per_epoch, 4),
            result.loss,
            result.correct / max(rows.supervised, 1),
            launched.lr,
            result.grad_norm,
            counts.samples,
            counts.tokens,
            counts.supervised,
            counts.seconds,
            counts.waited,
        )
        logged = self._is_logged(step)
        if logged and self.records:
            self.records.log(metrics)
        self.listener.step(metrics, logged)
        if self.saver:
            self.saver.report()

    def _total(self, step: int, numbers: Sequence[float]) -> list[float]:
        """Sums over all processes, exchanged before a step.

        With them each learns whether a signal came to one, so that all stop after this step, whether the leading one
        saves after it, and whether one has a warning.
        """
        saves = self.saver is not None and step < self.total and self.saver.is_due(step, self._is_logged(step))
        everyone = self.world.gather([*numbers, len(self.unsaid), saves, self.stop.signal or 0])
        *columns, unsaid, due, signals = zip(*everyone, strict=True)
        self._save_due = any(due)
        if any(unsaid):
            for rank, warnings in enumerate(self.world.gather_objects(self.unsaid)):
                for line in warnings:
                    self.listener.warning(f"process {rank}: {line}")
            self.unsaid.clear()
        if any(signals):
            self.stopped_by = Signals(int(max(signals)))
        return [sum(column) for column in columns]

    def _check_rows(self) -> None:
        """Check the first rows of the file, so that a run that they would end leaves no files.

        Raises DataError. Images are not decoded: one that ends its process ends a data worker, which names it.
        """
        broken, warnings = BrokenRows(self.plan.rows, self.plan.rows_per_step, self.config.data.bad_rows), list[str]()
        rows = self.plan.kept.nonzero()[0][:ROWS_TO_CHECK]
        try:
            broken.add(self.plan.check(rows), len(rows), warnings.append)
        except DataError:
            for line in warnings:
                self.listener.warning(line)
            raise

    def _right_already(self) -> Path | None:
        """With `until_right`, in one process and for few rows: the initial weights, if they answer all correctly."""
        if not self.config.until_right or self.world.size > 1 or self.plan.rows > MOST_TO_CHECK:
            return None
        if self.config.init in (None, NO_INIT):
            return None
        with explained(self.config):
            own = recall_own(self.config, self.plan, self.plan.rows)(self.train_step)
        return self.config.init if own and (own.rows, own.token_accuracy) == (self.plan.rows, 1) else None

    def _end_if_right(self, step: int) -> None:
        """With `until_right`, end the run after RIGHT_EPOCHS whole epochs of right answers."""
        epoch = self.plan.steps_per_epoch
        if self.config.until_right and step % epoch == 0 and self.progress.counts.right >= RIGHT_EPOCHS * epoch:
            self.total = step

    def _validate(self, validator: Validator, step: int) -> None:
        """Measure the held-out rows, and keep the weights if they are the best so far."""
        result = validator(self.train_step.model, self.train_step.features.features, step)
        if result is None:
            return
        best = Best(step, "loss on held-out rows", result.loss)
        is_best = self.config.best_by_validation and best.beats(self.best)
        self.listener.validated(replace(result, best=is_best))
        if is_best:
            self._keep_best(best)

    def _evaluates_at(self, step: int) -> bool:
        return bool(self.config.eval_every) and (step % self.config.eval_every == 0 or step == self.total)

    def _evaluate(self) -> None:
        """Measure the weights by a task, and keep them if they are the best so far. Its time is not the run's.

        Only the leading process does. It ends early where the run is asked to stop, and comes again after a resume.
        Several processes stop at the next step together, so there it goes on.
        """
        if self.evaluator is None:
            return
        begun, step = time.perf_counter(), self.progress.done
        try:
            scores = self.evaluator(step, lambda: self.world.size == 1 and self.stop.signal is not None)
        except MmvError as error:
            self.listener.lost(f"step {step}: not evaluated: {error}")
        else:
            if scores is not None:
                best = self.evaluator.best_of(scores)
                is_best = best is not None and best.beats(self.best)
                self.listener.evaluated(replace(scores, best=is_best))
                if best is not None and is_best:
                    self._keep_best(best)
        self._clock += time.perf_counter() - begun

    def _keep_best(self, best: Best) -> None:
        if self.saver and self.records and self.saver.save_best(best.step):
            self.best = best
            self.records.keep_best(best)

    def _end(self, save: bool) -> None:
        """Save and write the records, after a save that still runs."""
        if self.saver:
            self.saver.report(wait=True)
            if save:
                self.saver.save_now(self.progress.state(), self.progress.done >= self.total)
        self.train_step.features.flush()
        if self.records and save:
            self.records.restore(self.progress.done)
            if self.recall and self.progress.done >= self.total:
                self.recall.after()
            self.records.report()

    def _announce(self) -> None:
        config, device = self.config, self.train_step.model.device
        where = str(device) if self.world.size == 1 else f"{self.world.size} processes ({device.type})"
        rows = self.plan.rows_per_step
        about = announcement(config, self.plan, self.total, rows, self.train_step.model, where)
        self.listener.message(f"{about}; weights go to {RunFolder(config).weights}")
        if self.world.size == 1 and config.reduce_dtype != RunConfig.reduce_dtype:
            self.listener.warning(
                f"--reduce-dtype {config.reduce_dtype} changes nothing: one process exchanges no gradients"
            )
        if not self.progress.done:
            for line in before_the_start(config, self.plan, self.total):
                self.listener.warning(line)

    def _summary(self) -> Summary:
        folder, progress, counts = RunFolder(self.config), self.progress, self.progress.counts
        return Summary(
            folder.weights,
            folder.best_weights if self.best else None,
            folder.metrics,
            progress.done,
            self.stopped_by,
            progress.broken.kinds,
            counts.text_rows,
            counts.notes,
            progress.rows_read(progress.done),
            counts.bad,
            self.best,
        )
