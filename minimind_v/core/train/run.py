"""The one training loop. A recipe (config.recipes) makes it pretraining or fine-tuning."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from signal import Signals

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from minimind_v.core.config.limits import check_machine
from minimind_v.core.config.load import plain, to_yaml
from minimind_v.core.config.schedule import learning_rate
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.batch import Batch, stand_in
from minimind_v.core.data.feature_cache import FeatureCache, FeatureEncoder, open_feature_cache
from minimind_v.core.data.loader import load_steps
from minimind_v.core.device import autocast, has_fused_adamw, pick_device, require_determinism
from minimind_v.core.errors import DataError, MmvError, RunError
from minimind_v.core.files import write_text
from minimind_v.core.formats.checkpoint import export_tensors, write_checkpoint
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.monitor.diagnostics import Start
from minimind_v.core.monitor.manifest import write_manifest
from minimind_v.core.monitor.messages import BrokenRows, announcement, before_the_start, explained, not_finite, recalled
from minimind_v.core.monitor.metrics import JsonLines, Listener, Silent, StepMetrics
from minimind_v.core.monitor.recorder import Watch
from minimind_v.core.monitor.trackers import open_tracker
from minimind_v.core.pages.run_report import write_report
from minimind_v.core.rows.row import NOTES, describe_notes, describe_text_rows
from minimind_v.core.signals import StopRequest
from minimind_v.core.train.batch_size import find_batch_size
from minimind_v.core.train.build import build_model, open_data
from minimind_v.core.train.distributed import ALONE, World, alone_or_last
from minimind_v.core.train.freeze import freeze
from minimind_v.core.train.micro_batch import parts_of
from minimind_v.core.train.recall import Recall, earlier_run, recall_earlier, recall_own
from minimind_v.core.train.resume import State, pack, unpack
from minimind_v.core.train.run_folder import RunFolder
from minimind_v.core.train.saver import Saver, Snapshot
from minimind_v.core.train.validate import Validator
from minimind_v.core.wording import plural

MINUTE = 60.0  # seconds
RIGHT_EPOCHS = 2  # after one, its own last updates had unlearnt an answer to one of twelve rows
PATIENCE = 5  # updates in a row without a finite loss and gradient before a run is given up


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
    skipped: int = 0  # updates in a row without a finite gradient
    bad: int = 0  # all of them
    right: int = 0  # updates in a row in which every answer was predicted right


def train(
    config: RunConfig,
    listener: Listener,
    overwrite: bool = False,
    resume: bool = False,
    allowed: Collection[str] = (),
    auto: bool = False,
) -> Summary:
    """Train as the configuration says, and save. In each of several processes, it does that process's part.

    With `resume` a run that was stopped goes on, bit for bit as if it had not been (on a GPU only a deterministic one);
    what differs from it is refused unless its name is in `allowed`. With `auto` an update's rows are divided into the
    largest batches that there is memory for. Raises MissingInput, UsageError, DataError, WeightsError or RunError; what
    was learnt until then is saved first.
    """
    check_machine(config)
    world = World.find()
    with world.contact(), ExitStack() as held:
        summary = Run(config, listener, overwrite, resume, allowed, auto, world, held).fit()
        world.leave()
    return summary


class Run:
    """One training run: everything is built when it is made, `fit` does the work."""

    def __init__(
        self,
        config: RunConfig,
        listener: Listener,
        overwrite: bool = False,
        resume: bool = False,
        allowed: Collection[str] = (),
        auto: bool = False,
        world: World = ALONE,
        held: ExitStack | None = None,
    ) -> None:
        """`held` gets the lock of what the run writes, to release it when the run is over; without it none is taken."""
        self.world, self.place = world, RunFolder(config)
        self.listener = Watch(self.place.folder / "events.jsonl", listener) if world.leads else Silent()
        self.device = pick_device(config.device, world.local_rank if world.size > 1 else None)
        if config.deterministic and self.device.type == "cuda":
            require_determinism()
        world.join(self.device)
        if world.restarts:
            self.listener.say("a process was lost: all have started again")
            overwrite, resume = False, True
        if held and world.leads:
            self.place.lock(held, self.listener)
        claim = (
            self.place.claim(world.size, self.device, overwrite, resume, allowed, self.listener)
            if world.leads
            else None
        )
        self.claim = world.broadcast(claim)
        self.config = config = self._fit(config) if auto else config
        torch.manual_seed(config.seed)
        data = open_data(config, self.claim.origin, self.place.folder, world, self.listener)
        self.plan = data.plan
        self.validator = Validator(data.held_out, config.dtype, world.gather) if data.held_out else None
        loaded = build_model(config, data, self.listener)
        earlier = earlier_run(config.init)
        tokenizer = earlier.tokenizer if earlier else None
        same = None if tokenizer is None else tokenizer == self.claim.origin["data.tokenizer"]
        self.start = Start(config, loaded.weights, loaded.new_projector, same, self.plan.rows)
        self.companions = loaded.companions
        self.model = accelerate(loaded.model.to(self.device), self.device)
        self.memory = self._open_memory()
        self.trained = freeze(self.model, config.freeze)
        fused = has_fused_adamw(self.device)
        self.optimiser = torch.optim.AdamW(self.trained, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
        self.total = min(len(self.plan), config.max_steps or len(self.plan))
        self.broken = BrokenRows(self.plan.rows, self.claim.rows_per_step, config.data.bad_rows)
        self.troubles: set[str] = set()  # of data workers, each told once
        self.done = 0  # updates
        self.stopped_by: Signals | None = None
        self.saver, self.snapshot = Saver(), Snapshot()
        self.owed = False  # whether a save failed, or is due
        self.earlier: Recall | str = ""  # rows that the weights learnt before, or why none are measured
        self.saved_at = time.monotonic()  # or when the run began
        self.counts = Counts()
        if self.claim.state is not None:
            self._take_up(self.claim.state)
        self.shared = world.share(self.model)

    def _fit(self, config: RunConfig) -> RunConfig:
        """The batch size that is to be found: as before where a run goes on, else the largest that fits."""
        state = self.claim.state
        if state is not None and self.place.same_rows(state):
            size, accumulate = state.progress["split"]
            return replace(config, data=replace(config.data, batch_size=size), accumulate=accumulate)
        config, why = find_batch_size(config, self.device, self.world)
        self.listener.say(why)
        return config

    def _open_memory(self) -> FeatureCache:
        config, encoder, listener = self.config, self.model.vision_encoder, self.listener
        if encoder is None:  # features are given
            return FeatureCache()
        folder = config.features_dir or config.out / "features"
        eye = FeatureEncoder(encoder, self.device, config.dtype)
        memory = open_feature_cache(config.features, folder, eye, self.plan.rows, listener.say, listener.warn)
        self.plan.dataset.remembered = memory.store
        return memory

    def _take_up(self, state: State) -> None:
        unpack(state.tensors, self._named_trained(), self.optimiser)
        self.done = state.progress["step"]
        self.counts = Counts(**state.progress["counts"])
        self.broken.known = state.progress["broken"]
        self._end_if_right(self.done)
        self.listener.say(f"resuming after update {self.done} of {self.total}, from {state.path}")

    def _named_trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    # --- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> Summary:
        """Run to the end, or until a signal asks to stop; saves either way."""
        config, torn = self.config, False
        if self.done >= self.total:
            self.listener.say("this run is complete")
            return self._summary()
        begun = self.done
        self._open_records()
        self.model.train()
        where = str(self.device) if self.world.size == 1 else f"{self.world.size} processes ({self.device.type})"
        about = announcement(config, self.plan, self.total, self.claim.rows_per_step, self.model, where)
        self.listener.say(f"{about}; weights go to {self.place.weights}")
        if not begun:
            for line in before_the_start(config, self.plan, self.total):
                self.listener.warn(line)
        self._recall_before()
        self.started = time.perf_counter() - self.counts.seconds
        with (
            closing(self.listener),
            StopRequest() as self.stop,
            explained(config),
            self._metrics_file() as log,
        ):
            try:
                for step, batches in enumerate(self._updates(), self.done + 1):
                    metrics = self._update(step, batches)
                    if metrics is None:  # asked to stop before there was data
                        break
                    self.done = step
                    logged = step % config.log_every == 0 or step in (1, self.total)
                    if logged and log:
                        self._or_warn(step, partial(self._log, log, metrics))
                    self.listener.step(metrics, logged)
                    if self.validator and (step % config.val_every == 0 or step == self.total):
                        self._validate(self.validator, step)
                    if self.world.leads and step < self.total:
                        self._notice_save()
                        if self._save_is_due(step, logged):
                            self._begin_save()
                    if self.world.size == 1:  # several must stop after the same update
                        self.stopped_by = self.stop.signal
                    if self.stopped_by or step == self.total:
                        break
            except KeyboardInterrupt:  # a second signal, perhaps in the middle of an update
                torn = True
                raise
            finally:
                self._notice_save(wait=True)
                if self.done > begun and self.counts.supervised and not torn and self.world.leads:
                    self._save_at_the_end()
                    self._or_warn(self.done, partial(self._restore_records, log))
                    self._recall_after()
                    self._report()
        if not self.counts.supervised and not self.stopped_by:
            trouble = self.broken.first or "every answer is cut off"
            raise DataError(f"{config.data.file}: no row could be used; the first trouble: {trouble}")
        return self._summary()

    def _log(self, log: JsonLines, metrics: StepMetrics) -> None:
        if log.write(asdict(metrics)):
            self.listener.warn(
                f"step {metrics.step}: {log.path} was removed while the run wrote it, and is written again — what else "
                f"was in {self.config.out} is lost"
            )
            self._describe()

    def _restore_records(self, log: JsonLines | None) -> None:
        """Make again what somebody has removed, so that what is said of it at the end is true."""
        if log and log.restore():
            self.listener.warn(f"{log.path} was removed while the run went on, and is written again")
        if not (self.place.folder / "config.yaml").exists():
            self._describe()

    def _recall_before(self) -> None:
        """Measure a sample of what the weights learnt before the run, while it is all there."""
        config, listener = self.config, self.listener
        if not config.recall_rows or not isinstance(listener, Watch):
            return
        if self.world.size > 1:
            self.earlier = "a run of several processes does not measure it"
            return
        if config.init is None or not self.start.loaded:
            self.earlier = "it started from random weights"
            return
        self.earlier = recall_earlier(config, self.plan, self.memory.store)
        if isinstance(self.earlier, Recall) and not self.done:
            listener.say(f"measuring what {config.init} knows of {self.earlier.rows} rows of {self.earlier.name}")
            listener.keep_recalled("before", self.earlier(self.model, self.memory.features))

    def _recall_after(self) -> None:
        """Measure the run's own rows, and again those that its weights learnt before; say what was found."""
        config, listener = self.config, self.listener
        if not config.recall_rows or not isinstance(listener, Watch) or self.done < self.total:
            return
        try:
            if self.world.size == 1:
                listener.keep_recalled("own", recall_own(config, self.plan)(self.model, self.memory.features))
            if isinstance(self.earlier, Recall) and "before" in listener.recalled:
                listener.keep_recalled("after", self.earlier(self.model, self.memory.features))
        except MmvError as error:  # the weights are there: a row that was broken meanwhile does not end the run badly
            listener.warn(f"what the run has learnt and forgotten was not measured: {error}")
            return
        why = self.earlier if isinstance(self.earlier, str) else "its rows could not be measured before the run"
        said, warned = recalled(config, self.place.weights, listener.recalled, why)
        for line in said:
            listener.say(line)
        for line in warned:
            listener.warn(line)

    def _end_if_right(self, step: int) -> None:
        """End the run with this step where whole epochs of right answers are behind it and no more is asked for."""
        epoch = self.plan.steps_per_epoch
        if self.config.until_right and step % epoch == 0 and self.counts.right >= RIGHT_EPOCHS * epoch:
            self.total = step

    def _summary(self) -> Summary:
        place, counts = self.place, self.counts
        rows = (self.broken.kinds, counts.text_rows, counts.notes, self._rows_read(self.done))
        return Summary(place.weights, place.metrics, self.done, self.stopped_by, *rows, counts.bad)

    def _rows_read(self, step: int) -> int:
        """Rows of the set that were read until then, each counted once."""
        return min(step * self.claim.rows_per_step, self.plan.rows)

    def _open_records(self) -> None:
        """What the run leaves besides weights begins here."""
        if not isinstance(self.listener, Watch):
            return
        config, folder, best, tracker = self.config, self.place.folder, self.place.best_weights, None
        if config.track != "none":
            tracker = open_tracker(config.track, folder, folder.name, plain(config), self.done)
            self.listener.say(f"curves: {tracker.where}")
        self._describe()
        if not self.done:  # what was best in a run that is started over
            for path in (best, best.with_suffix(".json")):
                path.unlink(missing_ok=True)
        self.listener.begin(replace(self.start, done=self.done), tracker)

    def _describe(self) -> None:
        """Write what the run is made of."""
        folder, config = self.place.folder, self.config
        write_text(folder / "config.yaml", to_yaml(config))
        write_manifest(folder / "manifest.json", config, self.claim.origin, self.done, self.world.size)

    def _validate(self, validator: Validator, step: int) -> None:
        """Look at the held-out rows, and keep the weights where they have never been better."""
        found = validator(self.model, self.memory.features, step, self.listener.best)
        if found is None:
            return
        self.listener.validated(found)
        if found.best and self.world.leads:
            tensors, config = export_tensors(self.model), self.config
            what = (tensors, self.model.model_config, config.stage, self.companions)
            self._or_warn(step, partial(write_checkpoint, self.place.best_weights, *what))

    def _report(self) -> None:
        try:
            write_report(self.place.folder, self.listener.warn)
        except MmvError as error:  # no room, or no metrics for want of room
            self.listener.warn(f"no report: {error}")

    def _metrics_file(self) -> AbstractContextManager[JsonLines | None]:
        return closing(JsonLines(self.place.metrics, self.done)) if self.world.leads else nullcontext()

    def _updates(self) -> Iterator[list[Batch] | None]:
        """The batches of each update yet to do that fall to this process, fetched when they are needed.

        None, as the last one, where a signal asked to stop while they were waited for.
        """
        pin, workers = self.device.type == "cuda", self.config.data.workers
        with closing(load_steps(self.plan, workers, pin, self.done, self.listener.warn)) as updates:
            for _ in range(self.done, len(self.plan)):
                asked = time.perf_counter()
                batches = self.stop.wait(partial(next, updates))
                self.counts.waited += time.perf_counter() - asked
                for batch in batches or ():
                    if batch.trouble and batch.trouble not in self.troubles:
                        self.troubles.add(batch.trouble)
                        self.listener.warn(batch.trouble)
                    self.listener.batch(batch)
                yield batches

    def _update(self, step: int, batches: list[Batch] | None) -> StepMetrics | None:
        """One optimiser step: the loss is a mean over the supervised tokens of all batches of all processes.

        None, and nothing is done, where one of the processes was asked to stop before it had its batches.
        """
        lr = learning_rate(step - 1, self.total, self.config.lr)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        stopped = (self.stop.signal or 0) if batches is None else 0
        found = [row for batch in batches or () for row in batch.broken]
        batches = [batch for batch in batches or () if batch.supervised]
        tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        unmarked = sum(batch.text_rows for batch in batches)
        mine = [
            sum(batch.supervised for batch in batches),
            sum(map(len, batches)),
            tokens,
            unmarked,
            len(found),
            *(sum(batch.notes.get(note, 0) for batch in batches) for note in NOTES),
            stopped,
        ]
        *sums, signals = zip(*self.world.gather(mine), strict=True)
        if any(signals):
            self.stopped_by = Signals(int(max(signals)))
            return None
        supervised, rows, tokens, unmarked, broken, *noted = (int(sum(column)) for column in sums)
        if broken:
            everyone = [row for rows_found in self.world.gather_objects(found) for row in rows_found]
            self.broken.add(everyone, self._rows_read(step), self.listener.warn)
        notes = {note: count for note, count in zip(NOTES, noted, strict=True) if count}
        self._say_once(step, rows, unmarked, notes)
        parts, right = self._learn(batches, supervised, rows) if supervised else ([], 0)
        told = self.world.gather([sum(parts), right, self.stop.signal or 0])
        losses, hits, signals = zip(*told, strict=True)
        loss = float(sum(losses))
        self.stopped_by = Signals(int(max(signals))) if any(signals) else None
        grad_norm = float(nn.utils.clip_grad_norm_(self.trained, self.config.grad_clip)) if supervised else 0.0
        if supervised:
            self._step_if_finite(step, loss, grad_norm, batches, parts)
        counts = self.counts
        counts.samples += rows
        if step <= self.plan.steps_per_epoch:
            counts.text_rows += unmarked
            counts.notes = dict(Counter(counts.notes) + Counter(notes))
        counts.supervised += supervised
        counts.tokens += tokens
        counts.right = counts.right + 1 if sum(hits) == supervised else 0
        self._end_if_right(step)
        counts.seconds = time.perf_counter() - self.started
        return StepMetrics(
            step,
            self.total,
            round(step / self.plan.steps_per_epoch, 4),
            loss,
            sum(hits) / max(supervised, 1),
            lr,
            grad_norm,
            counts.samples,
            counts.tokens,
            counts.supervised,
            counts.seconds,
            counts.waited,
        )

    def _say_once(self, step: int, rows: int, text_rows: int, notes: Mapping[str, int]) -> None:
        """Say which of an update's rows are read in another way than they are written, where none was before."""
        lines = describe_notes({note: notes[note] for note in notes.keys() - self.counts.notes.keys()}, rows)
        if text_rows and not self.counts.text_rows:
            lines.insert(0, describe_text_rows(text_rows, rows))
        for line in lines:
            self.listener.say(f"step {step}: {line}; from here on they are only counted")

    def _learn(self, batches: list[Batch], supervised: int, rows: int) -> tuple[list[float], int]:
        """Gradients of this process's batches, summed with those of the others while the last one goes backward.

        Returns each batch's part of the loss, and how many tokens were guessed right. `supervised` tokens and `rows`
        are those of all processes. One that has no batch learns nothing from a stand-in, since all must take part.
        """
        losses: list[Tensor] = []
        hits = torch.zeros((), device=self.device)
        batches = batches or [stand_in(self.plan.pad_id)]
        for number, batch in enumerate(batches, 1):
            losses.append(torch.zeros((), device=self.device))
            parts = parts_of(batch, self.memory, self.device)
            for part in parts:
                with alone_or_last(self.shared, number == len(batches) and part is parts[-1]):
                    with autocast(self.device, self.config.dtype):
                        out = self.shared(**part.tokens, image_features=part.image_features)
                    share = len(part) / rows if batch.supervised else 0.0
                    loss = out.loss_sum / supervised + out.aux_loss * share
                    (loss * self.world.size).backward()  # gradients of several processes are averaged
                losses[-1] += loss.detach()
                hits += out.hits.sum()
        return [float(loss) for loss in losses], int(hits)

    def _step_if_finite(
        self, step: int, loss: float, grad_norm: float, batches: list[Batch], parts: list[float]
    ) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimiser.step()
            increment_version(
                self.trained
            )  # which a fused step leaves as it was: what is made of weights would not see it
            self.counts.skipped = 0
        else:
            self.counts.skipped += 1
            self.counts.bad += 1
            worst = [batch for batch, part in zip(batches, parts, strict=False) if not math.isfinite(part)] or batches
            suspects = self.world.gather_objects([place for batch in worst for place in batch.places])
            places = [place for process in suspects for place in process]
            self.listener.warn(f"step {step}: {not_finite(loss, grad_norm, places)}")
            if self.counts.skipped == min(PATIENCE, self.total):
                raise RunError(
                    f"{plural(self.counts.skipped, 'update')} in a row without a finite loss — lower --lr, or look at "
                    "the rows above"
                )
        self.optimiser.zero_grad(set_to_none=True)

    # --- saving -------------------------------------------------------------------------------------------------------

    def _save_is_due(self, step: int, logged: bool) -> bool:
        """After save_every updates and save_minutes; where that failed, at every logged one until it succeeds.

        Only the first process saves, and every process has the same weights: none has to ask the others.
        """
        every, minutes = self.config.save_every, self.config.save_minutes
        late = bool(minutes) and time.monotonic() - self.saved_at >= minutes * MINUTE and not self.saver.busy
        due = late or (bool(every) and step % every == 0)
        self.owed = self.owed or due
        return due or (self.owed and logged)

    def _begin_save(self) -> None:
        """Take what the next update will change; the rest is done by a thread. Waits where a save is still running."""
        self._notice_save(wait=True)
        self.owed, self.saved_at = False, time.monotonic()
        self.saver.start(self.done, self._save())

    def _save(self) -> Callable[[], None]:
        """What writes the state of this moment, and the weights."""
        step, split = self.done, [self.config.data.batch_size, self.config.accumulate]
        progress = {"step": step, "counts": asdict(self.counts), "broken": dict(self.broken.known), "split": split}
        tensors, ready = self.snapshot.take(pack(self._named_trained(), self.optimiser))
        weights: dict[str, Tensor] | RunError
        try:
            weights = export_tensors(self.model)
        except RunError as error:  # there may be a state all the same
            weights = error

        def write() -> None:
            ready()
            try:
                self.place.states.write(step, tensors, progress, self.claim.origin)
            finally:  # there may be room for the weights alone
                if isinstance(weights, RunError):
                    raise weights
                described = self.model.model_config
                write_checkpoint(self.place.weights, weights, described, self.config.stage, self.companions)

        return write

    def _notice_save(self, wait: bool = False) -> None:
        """Tell how the save in the background has ended. A full disk in the night must not end the run."""
        ended = self.saver.outcome(wait)
        if ended is None:
            return
        if ended.error is None:
            self.listener.saved(ended.step)
        elif isinstance(ended.error, RunError):
            self.owed = True  # the next time there may be room
            self.listener.warn(f"step {ended.step}: {ended.error}")
        else:
            raise ended.error

    def _save_at_the_end(self) -> None:
        try:
            self._save()()
        except RunError as error:
            raise RunError(f"{error} — {self.place.next_step()}") from None
        self.listener.saved(self.done)

    def _or_warn(self, step: int, write: Callable[[], None]) -> None:
        """A full disk in the night must not end the run."""
        try:
            write()
        except RunError as error:
            self.listener.warn(f"step {step}: {error}")
