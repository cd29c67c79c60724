"""The one training loop. A recipe (config.recipes) makes it pretraining or fine-tuning."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from signal import Signals

import numpy as np
import torch
from torch import nn

from minimind_v.core.checkpoint.weights import export_tensors, load_into, read_checkpoint, write_checkpoint
from minimind_v.core.config.load import plain, to_yaml
from minimind_v.core.config.presets import weights_name
from minimind_v.core.config.recipes import NO_INIT
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.batch import Batch, stand_in
from minimind_v.core.data.dataset import BrokenRow, RowDataset
from minimind_v.core.data.features.memory import Eye, Memory, open_memory
from minimind_v.core.data.heldout import hold_out
from minimind_v.core.data.loader import BatchPlan, load_updates
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.stores import open_rows
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.device import autocast, pick_device
from minimind_v.core.errors import DataError, MissingInput, MmvError, RunError, UsageError
from minimind_v.core.files import write_text
from minimind_v.core.hub.sources import how_to_get
from minimind_v.core.model.vision import VisionEncoder
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.distributed import ALONE, World, alone_or_last
from minimind_v.core.train.freeze import freeze
from minimind_v.core.train.interrupt import StopRequest
from minimind_v.core.train.manifest import write_manifest
from minimind_v.core.train.metrics import Listener, MetricsFile, Silent, StepMetrics
from minimind_v.core.train.report import write_report
from minimind_v.core.train.schedule import learning_rate
from minimind_v.core.train.signs import Start
from minimind_v.core.train.state import State, States, check_origin, origin_of, pack, unpack
from minimind_v.core.train.track import open_tracker
from minimind_v.core.train.validate import Validator
from minimind_v.core.train.watch import Watch

PATIENCE = 5  # updates in a row without a finite loss and gradient before a run is given up


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    weights: Path
    metrics: Path
    steps: int
    last: StepMetrics | None
    stopped_by: Signals | None  # None: it came to its end
    broken_rows: int
    bad_updates: int  # skipped, since loss or gradient was not finite


@dataclass
class Counts:
    """What adds up over a run, also over one that is resumed."""

    samples: int = 0
    tokens: int = 0  # real ones, placeholders included
    supervised: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of these, for data
    skipped: int = 0  # updates in a row without a finite gradient
    bad: int = 0  # all of them


def train(
    config: RunConfig,
    listener: Listener,
    overwrite: bool = False,
    resume: bool = False,
    allowed: Collection[str] = (),
) -> Summary:
    """Train as the configuration says, and save. In each of several processes, it does that process's part.

    With `resume` a run that was stopped goes on, bit for bit as if it had not been; what differs from it is refused
    unless its name is in `allowed`. Raises MissingInput, UsageError, DataError, WeightsError or RunError; what was
    learnt until then is saved first.
    """
    world = World.find()
    with world.contact():
        summary = Run(config, listener, overwrite, resume, allowed, world).fit()
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
        world: World = ALONE,
    ) -> None:
        self.config = config
        self.world = world
        self.weights = config.out / weights_name(config.stage, config.model)
        self.best_weights = self.weights.with_name(f"{self.weights.stem}_best.pth")
        self.folder = self.weights.with_suffix("")  # what a run writes besides weights
        self.listener = Watch(self.folder / "events.jsonl", listener) if world.leads else Silent()
        self.states = States(self.folder / "states", config.keep)
        self.device = pick_device(config.device, world.local_rank if world.size > 1 else None)
        world.join(self.device)
        if world.restarts:
            self.listener.say("a process was lost: all have started again")
            overwrite, resume = False, True
        self.rows_per_update = config.data.batch_size * config.accumulate * world.size
        state = world.broadcast(self._claim(overwrite, resume, allowed) if world.leads else None)
        if state is not None:
            self.rows_per_update = state.origin["rows_per_update"]
        torch.manual_seed(config.seed)
        self.validator: Validator | None = None
        self.plan = self._open_data()
        self.model = self._build_model().to(self.device)
        self.memory = self._open_memory()
        self.trained = freeze(self.model, config.freeze)
        # Fused AdamW does the whole update in one pass over each tensor; same arithmetic.
        fused = self.device.type in ("cpu", "cuda")
        self.optimiser = torch.optim.AdamW(self.trained, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
        self.total = len(self.plan)
        if config.max_steps:
            self.total = min(self.total, config.max_steps)
        self.broken: dict[str, str] = {}  # place → what is wrong there
        self.done = 0  # updates
        self.stopped_by: Signals | None = None
        self.owed = False  # whether a save failed, or is due
        self.counts = Counts()
        if state is not None:
            self._take_up(state)
        self.shared = world.share(self.model)

    # --- building -----------------------------------------------------------------------------------------------------

    def _open_data(self) -> BatchPlan:
        data = self.config.data
        self.encoder = VisionEncoder.load(self.config.vision_model)
        self.tokenizer = Tokenizer.load(data.tokenizer)
        if self.tokenizer.vocab_size > self.config.model.vocab_size:
            raise UsageError(
                f"the tokenizer in {data.tokenizer} has {self.tokenizer.vocab_size} tokens, the model only "
                f"{self.config.model.vocab_size} — they do not belong together (--preset, --tokenizer)"
            )
        spec = self.encoder.spec
        prompts = PromptEncoder(self.tokenizer, spec.tokens_per_image)
        rows = open_rows(data.file, data.images)
        dataset = RowDataset(rows, prompts, spec.image_size, data.max_length)
        shared_by = {"processes": self.world.size, "rank": self.world.rank}
        pad_id, learnt = self.tokenizer.pad_id, None
        if self.config.val_every:
            held_out = self.world.broadcast(self._hold_out(dataset) if self.world.leads else None)
            looked_at = BatchPlan(dataset, data.batch_size, pad_id, keep=held_out, **shared_by)
            self.validator, learnt = Validator(looked_at, self.config.dtype, self.world.gather), ~held_out
        return BatchPlan(
            dataset,
            data.batch_size,
            pad_id,
            self.config.seed,
            self.config.epochs,
            rows_per_update=self.rows_per_update,
            keep=learnt,
            **shared_by,
        )

    def _hold_out(self, dataset: RowDataset) -> np.ndarray:
        known, inputs = self.folder / "held_out.json", [self.origin[key] for key in ("data.file", "data.images")]
        return hold_out(
            dataset.rows, self.config.val_rows, self.config.seed, known, json.dumps(inputs), self.listener.say
        )

    def _build_model(self) -> VLM:
        config = self.config
        model = VLM(config.model, self.encoder.spec, self.tokenizer.placeholder_id, self.encoder)
        if config.init is None or config.init == NO_INIT:
            self.loaded, self.new_projector = False, True
            self.listener.warn("starting from random weights: the language model knows nothing yet")
            return model
        try:
            checkpoint = read_checkpoint(config.init)
        except MissingInput as error:
            before = "`mmv train pretrain`" if config.stage == "sft" else how_to_get("lm", config.init.parent)
            raise MissingInput(f"{error} to start from — {before}, or name a file with --init") from None
        receipt = load_into(model, checkpoint, new_projector=config.stage == "pretrain")
        self.loaded, self.new_projector = True, bool(receipt.new)
        self.listener.say(str(receipt))
        return model

    def _open_memory(self) -> Memory:
        config, encoder, listener = self.config, self.model.vision_encoder, self.listener
        if encoder is None:  # features are given
            return Memory()
        folder = config.features_dir or config.out / "features"
        eye = Eye(encoder, self.device, config.dtype)
        memory = open_memory(config.features, folder, eye, self.plan.rows, listener.say, listener.warn)
        self.plan.dataset.remembered = memory.store
        return memory

    # --- starting, or going on ----------------------------------------------------------------------------------------

    def _claim(self, overwrite: bool, resume: bool, allowed: Collection[str]) -> State | None:
        """Make sure that this run may write where it will; returns what it goes on from, if that is asked for."""
        self._refuse_to_replace(overwrite, resume)
        self.origin = origin_of(self.config)
        self.origin["rows_per_update"] = self.rows_per_update
        if not resume:
            self.states.supersede(at_once=self.world.size > 1)
            return None
        state = self.states.newest(self.listener.warn)
        if state is None:
            self.listener.say(f"nothing to resume in {self.folder}: starting")
            return None
        if state.progress.get("split") == self._split:  # more or fewer processes share the same updates
            self.origin["rows_per_update"] = state.origin["rows_per_update"]
        check_origin(state.origin, self.origin, allowed, self.listener.warn)
        before = state.origin.get("rows_per_update", self.origin["rows_per_update"])
        state.progress["step"] = state.progress["step"] * before // self.origin["rows_per_update"]
        return replace(state, origin=self.origin)

    @property
    def _split(self) -> list[int]:
        return [self.config.data.batch_size, self.config.accumulate]

    def _refuse_to_replace(self, overwrite: bool, resume: bool) -> None:
        if overwrite and resume:
            raise UsageError("--overwrite starts over, --resume goes on: give one of them")
        there = [path for path in (self.weights, *self.states.paths()) if path.exists()]
        if resume and self.weights.exists() and not self.states.paths():
            raise UsageError(
                f"{self.weights} is there, but no state to go on from (in {self.states.folder}) — "
                "add --overwrite to replace it, or name another --out"
            )
        if there and not overwrite and not resume:
            raise UsageError(
                f"{there[0]} is there from an earlier run — add --resume to go on with it, --overwrite to replace it, "
                "or name another --out"
            )

    def _take_up(self, state: State) -> None:
        unpack(state.tensors, self._named_trained(), self.optimiser)
        self.done = state.progress["step"]
        self.counts = Counts(**state.progress["counts"])
        self.broken = state.progress["broken"]
        self.listener.say(f"resuming after update {self.done} of {self.total}, from {state.path}")

    def _named_trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    # --- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> Summary:
        """Run to the end, or until a signal asks to stop; saves either way."""
        config, metrics, torn = self.config, None, False
        metrics_path = self.folder / "metrics.jsonl"
        if self.done >= self.total:
            self.listener.say("this run is complete")
            return Summary(self.weights, metrics_path, self.done, None, None, len(self.broken), self.counts.bad)
        self.started = time.perf_counter() - self.counts.seconds
        begun = self.done
        self._open_records()
        self.model.train()
        self._announce()
        with (
            closing(self.listener),
            StopRequest() as self.stop,
            _explained(config, self.plan),
            self._metrics_file(metrics_path) as log,
        ):
            try:
                for step, batches in enumerate(self._updates(), self.done + 1):
                    metrics = self._update(step, batches)
                    self.done = step
                    logged = step % config.log_every == 0 or step in (1, self.total)
                    if logged and log:
                        self._or_warn(step, partial(log.write, metrics))
                    self.listener.step(metrics, logged)
                    if self.validator and (step % config.val_every == 0 or step == self.total):
                        self._validate(self.validator, step)
                    if self._save_is_due(step, logged) and step < self.total:
                        self._or_warn(step, self._save)
                    if self.world.size == 1:  # several must stop after the same update
                        self.stopped_by = self.stop.signal
                    if self.stopped_by or step == self.total:
                        break
            except KeyboardInterrupt:  # a second signal, perhaps in the middle of an update
                torn = True
                raise
            finally:
                if self.done > begun and self.counts.supervised and not torn:
                    self._save()
                    self._report()
        if not self.counts.supervised:
            trouble = next(iter(self.broken.values()), "every answer is cut off")
            raise DataError(f"{config.data.file}: no row could be used; the first trouble: {trouble}")
        return Summary(
            self.weights, metrics_path, self.done, metrics, self.stopped_by, len(self.broken), self.counts.bad
        )

    def _open_records(self) -> None:
        """What the run leaves besides weights begins here."""
        if not isinstance(self.listener, Watch):
            return
        config, tracker = self.config, None
        if config.track != "none":
            tracker = open_tracker(config.track, self.folder, self.folder.name, plain(config), self.done)
            self.listener.say(f"curves: {tracker.where}")
        write_text(self.folder / "config.yaml", to_yaml(config))
        write_manifest(self.folder / "manifest.json", config, self.origin, self.done, self.world.size)
        if not self.done:  # what was best in a run that is started over
            for path in (self.best_weights, self.best_weights.with_suffix(".json")):
                path.unlink(missing_ok=True)
        self.listener.begin(Start(config, self.loaded, self.new_projector, self.done), tracker)

    def _validate(self, validator: Validator, step: int) -> None:
        """Look at the held-out rows, and keep the weights where they have never been better."""
        found = validator(self.model, self.memory.features, step, self.listener.best)
        if found is None:
            return
        self.listener.validated(found)
        if found.best and self.world.leads:
            tensors, config = export_tensors(self.model), self.config
            self._or_warn(step, partial(write_checkpoint, self.best_weights, tensors, config.model, config.stage))

    def _report(self) -> None:
        if not self.world.leads:
            return
        try:
            write_report(self.folder)
        except MmvError as error:  # no room, or no metrics for want of room
            self.listener.warn(f"no report: {error}")

    def _metrics_file(self, path: Path) -> AbstractContextManager[MetricsFile | None]:
        return closing(MetricsFile(path, self.done)) if self.world.leads else nullcontext()

    def _updates(self) -> Iterator[list[Batch]]:
        """The batches of each update yet to do that fall to this process, fetched when they are needed."""
        pin = self.device.type == "cuda"
        with closing(load_updates(self.plan, self.config.data.workers, pin, self.done)) as updates:
            while True:
                asked = time.perf_counter()
                batches = next(updates, None)
                self.counts.waited += time.perf_counter() - asked
                if batches is None:
                    return
                for batch in batches:
                    self.listener.batch(batch)
                yield batches

    def _update(self, step: int, batches: list[Batch]) -> StepMetrics:
        """One optimiser step: the loss is a mean over the supervised tokens of all batches of all processes."""
        lr = learning_rate(step - 1, self.total, self.config.lr)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        found = [row for batch in batches for row in batch.broken]
        batches = [batch for batch in batches if batch.supervised]
        tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        mine = [sum(batch.supervised for batch in batches), sum(map(len, batches)), tokens, len(found)]
        supervised, rows, tokens, broken = (int(sum(column)) for column in zip(*self.world.gather(mine), strict=True))
        if broken:
            self._note_broken([row for rows_found in self.world.gather_objects(found) for row in rows_found])
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
        counts.supervised += supervised
        counts.tokens += tokens
        counts.seconds = time.perf_counter() - self.started
        return StepMetrics(
            step,
            self.total,
            round(step / self.plan.updates_per_epoch, 4),
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

    def _learn(self, batches: list[Batch], supervised: int, rows: int) -> tuple[list[float], int]:
        """Gradients of this process's batches, summed with those of the others while the last one goes backward.

        Returns each batch's part of the loss, and how many tokens were guessed right. `supervised` tokens and `rows`
        are those of all processes. One that has no batch learns nothing from a stand-in, since all must take part.
        """
        parts, hits = [], torch.zeros((), device=self.device)
        batches = batches or [stand_in(self.plan.pad_id)]
        for number, batch in enumerate(batches, 1):
            moved = batch.to(self.device)
            with alone_or_last(self.shared, number == len(batches)):
                with autocast(self.device, self.config.dtype):
                    out = self.shared(
                        moved.input_ids,
                        attention_mask=moved.attention_mask,
                        image_features=self.memory.features(moved),
                        image_mask=moved.image_mask,
                        labels=moved.labels,
                    )
                share = len(batch) / rows if batch.supervised else 0.0
                part = out.loss_sum / supervised + out.aux_loss * share
                (part * self.world.size).backward()  # gradients of several processes are averaged
            parts.append(part.detach())
            hits += out.hits.sum()
        return [float(part) for part in parts], int(hits)

    def _step_if_finite(
        self, step: int, loss: float, grad_norm: float, batches: list[Batch], parts: list[float]
    ) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimiser.step()
            self.counts.skipped = 0
        else:
            self.counts.skipped += 1
            self.counts.bad += 1
            worst = [batch for batch, part in zip(batches, parts, strict=False) if not math.isfinite(part)] or batches
            suspects = self.world.gather_objects([place for batch in worst for place in batch.places])
            places = [place for process in suspects for place in process]
            more = f" and {len(places) - 8} more" if len(places) > 8 else ""
            self.listener.warn(
                f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}: skipped; "
                f"its rows: {', '.join(places[:8])}{more}"
            )
            if self.counts.skipped == PATIENCE:
                raise RunError(
                    f"{PATIENCE} updates in a row without a finite loss — lower --lr, or look at the rows above"
                )
        self.optimiser.zero_grad(set_to_none=True)

    # --- words --------------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        config, data = self.config, self.plan.dataset
        trained = sum(parameter.numel() for parameter in self.trained)
        everything = sum(p.numel() for name, p in self.model.named_parameters() if not name.startswith("vision_"))
        everything += sum(p.numel() for p in self.model.vision_proj.parameters())
        where = str(self.device) if self.world.size == 1 else f"{self.world.size} processes ({self.device.type})"
        self.listener.say(
            f"{config.stage}: {len(data):,} rows of {config.data.file}, {config.epochs} epochs, "
            f"{self.total:,} updates of {self.rows_per_update} rows on {where}; "
            f"{trained:,} of {everything:,} parameters learn ({config.freeze}); weights go to {self.weights}"
        )

    def _note_broken(self, found: list[BrokenRow]) -> None:
        for row in found:
            if row.place in self.broken:
                continue
            self.broken[row.place] = str(row)
            if len(self.broken) <= 5:
                self.listener.warn(f"row skipped: {row}")
        rows, allowed = self.plan.rows, self.config.data.bad_rows
        if len(self.broken) > allowed * rows:
            first = next(iter(self.broken.values()))
            raise DataError(
                f"{len(self.broken)} of {rows} rows are broken, more than {allowed:.0%}; "
                f"the first: {first} — mend the data, or allow more with --set data.bad_rows=0.1"
            )

    # --- saving -------------------------------------------------------------------------------------------------------

    def _save_is_due(self, step: int, logged: bool) -> bool:
        """At every save_every-th update, and where that failed at every logged one until it succeeds."""
        every = self.config.save_every
        self.owed = self.owed or (bool(every) and step % every == 0)
        return self.owed and (logged or step % every == 0)

    def _save(self) -> None:
        if not self.world.leads:
            return
        progress = {"step": self.done, "counts": asdict(self.counts), "broken": self.broken, "split": self._split}
        try:
            self.states.write(self.done, pack(self._named_trained(), self.optimiser), progress, self.origin)
        finally:  # there may be room for the weights alone
            write_checkpoint(self.weights, export_tensors(self.model), self.config.model, self.config.stage)
        self.owed = False
        self.listener.saved(self.done)

    def _or_warn(self, step: int, write: Callable[[], None]) -> None:
        """A full disk in the night must not end the run: the next time there may be room."""
        try:
            write()
        except RunError as error:
            self.listener.warn(f"step {step}: {error}")


@contextmanager
def _explained(config: RunConfig, plan: BatchPlan) -> Iterator[None]:
    """Turn what torch raises for want of memory, or over a dead data worker, into words with a next step."""
    try:
        yield
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one; a CPU's allocator has none of its own
        if dead := re.search(r"DataLoader worker \(pid\(?s?\)? ?(\d+)", str(error)):
            place = plan.read_by(int(dead[1]))
            raise RunError(
                f"a data worker died{f' at {place}' if place else ''} — look at that row, or, where memory is short, "
                f"try --workers 0 ({error})"
            ) from None
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        batch, accumulate = config.data.batch_size, config.accumulate
        half = next((size for size in range(batch // 2, 0, -1) if batch % size == 0), 0)
        advice = f"the same recipe with less: --batch-size {half} --accumulate {accumulate * batch // max(half, 1)}"
        if not half:
            advice = f"lower --max-length {config.data.max_length}, or take a smaller --preset"
        raise RunError(f"out of memory — {advice}") from None
