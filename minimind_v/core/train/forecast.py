"""Forecasts of the time, memory and disk of a run: by a few real steps, or by synthetic ones."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from minimind_v.core.config.generation import generation_of
from minimind_v.core.config.load import as_settings
from minimind_v.core.config.recipes import NO_INIT
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.curate.stats import SampleCount, TypicalRow, count_sample
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.device import gpu_names, peak_memory, pick_device
from minimind_v.core.files import write_text
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.formats.generations import check_base
from minimind_v.core.model.projector import projected
from minimind_v.core.model.vision.spec import read_vision_spec
from minimind_v.core.monitor.messages import too_little
from minimind_v.core.monitor.metrics import Listener, StepMetrics, TaskScores
from minimind_v.core.pages.run_report import disk_used
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.graph import peak_with_recordings
from minimind_v.core.train.loop import Run
from minimind_v.core.train.run import assemble
from minimind_v.core.train.run_folder import RunFolder
from minimind_v.core.train.trial import Trial, seconds
from minimind_v.core.wording import plural

SECONDS = 30.0  # for the measured steps, after the first ENOUGH
ENOUGH = 3  # measured steps, at least
WARM, MOST = {"cuda": 10}, {"cuda": 300}  # warm-up steps, and the most measured steps; a GPU is quick
WARM_ELSEWHERE, MOST_ELSEWHERE = 2, 20
QUESTIONS = 32  # of an evaluation that is measured
TRIAL_SECONDS = 4.0  # for a synthetic batch
CPU_TOKENS = 1024  # of a synthetic batch on a CPU, whose time per token is the same for more
GPU_TIMES = 5  # measurements of a synthetic batch on a GPU; the fastest counts


@dataclass(frozen=True)
class Forecast:
    """Time, memory, disk and cost of a run. Its report compares them with the results, by these names."""

    stage: str
    updates: int
    samples: int
    tokens: int  # real ones, of all epochs, placeholders included
    supervised_tokens: int
    seconds: float  # evaluations by a task included:
    evaluation_seconds: float | None  # None: there are none
    memory_bytes: int  # the most that one process will hold, on a GPU with the recordings of its steps
    disk_bytes: int  # weights, states and records
    features_bytes: int | None  # of the feature cache, which is not in disk_bytes; None: nothing is cached
    price_per_hour: float | None
    cost: float | None
    how: str  # the times were measured
    learning_rate: list[float]  # of the first step and of the last
    warning: str | None  # a problem that is certain
    config: dict[str, Any]


def plan(
    config: RunConfig,
    price_per_hour: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda message: None,
) -> Forecast:
    """Forecast a run, and write the forecast into the run folder, where its report reads it.

    Rows are counted as the first epoch reads them (a sample of very many); then the real run does a few steps in a
    temporary folder, from random weights, which take as long as trained ones. Raises what a run raises.
    """
    if config.init not in (None, NO_INIT) and config.init.exists():  # it is not needed, but the run would refuse it
        check_base(config.init, read_checkpoint(config.init).config, config.model)
    tokenizer = Tokenizer.load(config.data.tokenizer, config.data.layout)
    spec = projected(read_vision_spec(config.vision_model), config.projector)
    rows = open_rows(config.data.file, config.data.images, config.data.split, say)
    sample = count_sample(rows, PromptEncoder(tokenizer, spec.tokens_per_image), config, progress=progress)
    steps = min(sample.steps, config.max_steps or sample.steps)
    first = min(sample.steps // config.epochs, steps)  # in the epoch that encodes the images
    watch, later, memory, disk = _measure(config, steps, first)
    tokens, new = (_of_run(sample, count, sample.counted.kept) for count in (steps, first))
    training = (watch.per_token * new + later.per_token * (tokens - new)) / config.gpus
    evaluating, evaluated = evaluation_time(config, watch, steps)
    time = training + (evaluating or 0.0)
    store = watch.run.train_step.features.store
    images = _of_run(sample, first, sample.counted.pictures_kept)
    size, cached = None, ""
    if store is not None:
        size, record = images * store.layout.record, f"{store.layout.record / 1e3:.0f} kB"
        cached = f"; the feature cache takes {record} for each of {plural(images, 'image')}, equal images once"
    remembered = ", and once more with the features cached, as in later epochs" if later is not watch else ""
    several = f", {config.gpus} processes assumed to be {config.gpus} times as fast as one" if config.gpus > 1 else ""
    most = "; the run stops when every answer is correct, so this is an upper limit" if config.until_right else ""
    forecast = Forecast(
        config.stage,
        steps,
        _of_run(sample, steps, sample.counted.used),
        tokens,
        _of_run(sample, steps, sample.counted.supervised),
        time,
        evaluating,
        memory,
        disk,
        size,
        price_per_hour,
        None if price_per_hour is None else price_per_hour * time / 3600,
        f"{watch.measured} steps of the real run, measured on this machine, reading included{remembered}: "
        f"{training / steps:.2f} s per step of average length{several}{evaluated}{cached}; saving and validation are "
        f"not included, and longer rows may need more memory{most}",
        [generation_of(config.model).cosine.peak(config.lr), config.lr / 10],
        too_little(config, len(rows), steps),
        as_settings(config),
    )
    text = json.dumps(asdict(forecast), indent=1, ensure_ascii=False)
    write_text(RunFolder(config).folder / "forecast.json", f"{text}\n")
    return forecast


class Stopwatch(Listener):
    """Measures the time of a few steps of a run, then ends it."""

    run: Run

    def __init__(self) -> None:
        self.evaluations: list[TaskScores] = []
        self.warm: StepMetrics | None = None  # the last step of the warm-up
        self.last: StepMetrics | None = None

    def step(self, metrics: StepMetrics, logged: bool) -> None:
        self.last = metrics
        kind = self.run.train_step.model.device.type
        if metrics.step <= min(WARM.get(kind, WARM_ELSEWHERE), metrics.steps - 1):
            self.warm = metrics
            return
        spent = metrics.seconds - (self.warm.seconds if self.warm else 0.0)
        if self.measured >= MOST.get(kind, MOST_ELSEWHERE) or (self.measured >= ENOUGH and spent > SECONDS):
            self.run.total = metrics.step

    def evaluated(self, scores: TaskScores) -> None:
        self.evaluations.append(scores)

    @property
    def measured(self) -> int:
        """Steps."""
        assert self.last
        return self.last.step - (self.warm.step if self.warm else 0)

    @property
    def per_token(self) -> float:
        """Seconds for a token of a row."""
        assert self.last
        seconds, tokens = (self.warm.seconds, self.warm.tokens) if self.warm else (0.0, 0)
        return (self.last.seconds - seconds) / max(self.last.tokens - tokens, 1)


def _measure(config: RunConfig, steps: int, first: int) -> tuple[Stopwatch, Stopwatch, int, int]:
    """Measure a few steps of the first epoch, which has `first` steps, and of later ones.

    Returns a stopwatch of each, the bytes of memory, and the bytes on the disk of the whole run.
    """
    watch = later = Stopwatch()
    with tempfile.TemporaryDirectory(prefix="mmv-plan-") as out:
        few = replace(
            config, out=Path(out), init=NO_INIT, save_every=0, save_minutes=0, val_every=0, until_right=False,
            recall_rows=0, track="none", gpus=1, best_by=None,
            max_steps=min(steps, max(first, max(WARM.values()) + ENOUGH)),
            eval_every=steps if config.eval_every else 0,  # before the first step and after the last
            eval_limit=min(config.eval_limit, QUESTIONS),
        )  # fmt: skip
        watch.run = run = assemble(few, watch)
        run.run()
        folder = RunFolder(few)
        state = sum(path.stat().st_size for path in folder.states.paths())
        best = folder.weights.stat().st_size if config.val_every or config.best_by else 0
        saves = -(-steps // config.save_every) if config.save_every else 1
        device, weights = run.train_step.model.device, sum(weight.nbytes for weight in run.train_step.trainable)
        recorded = peak_with_recordings(device, weights) if device.type == "cuda" else 0  # most steps are later
        memory = max(*peak_memory(), recorded)
        disk = disk_used(folder.folder) + best + (min(config.keep, saves) - 1) * state
        if steps > first and run.train_step.features.store is not None:
            later = Stopwatch()
            later.run = assemble(replace(few, max_steps=run.progress.done, eval_every=0), later, overwrite=True)
            later.run.run()
        return watch, later, memory, disk


def evaluation_time(config: RunConfig, watch: Stopwatch, steps: int) -> tuple[float | None, str]:
    """Seconds of all evaluations of a run, of which only the first encodes the images, and how they were measured."""
    if watch.run.evaluator is None or not watch.evaluations:
        return None, ""
    first, last = watch.evaluations[0], watch.evaluations[-1]
    available = watch.run.evaluator.available
    count, questions = 1 + -(-steps // config.eval_every), min(config.eval_limit, available)
    return (
        (first.seconds + (count - 1) * last.seconds) * questions / first.rows,
        f"; {plural(count, 'evaluation')} of {plural(questions, 'question')}, measured on {first.rows:,} of them by "
        "random weights, whose answers may be longer than those of trained ones",
    )


def _of_run(sample: SampleCount, steps: int, counted: int) -> int:
    """A count over the sampled rows, scaled to so many steps of the run."""
    return round(counted / sample.counted_rows * sample.planned_rows * steps / sample.steps)


# --- by synthetic steps -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Seconds of a whole run, None if they could not be measured, and how they were measured."""

    seconds: float | None
    how: str


def estimate(config: RunConfig, row: TypicalRow, rows: float, steps: int) -> Estimate:
    """Seconds of a run over `rows` rows (all epochs together) in `steps` steps.

    It measures forward and backward of a batch of the recipe's sizes, or of fewer rows if they take too long. It reads
    no weights and no rows.
    """
    try:
        device = pick_device(config.device)
        trial = Trial(config, device, light=True)
        length = min(max(round(row.length), 2), config.data.max_length)
        supervised = min(max(round(row.supervised), 1), length - 1)
        most = max(1, CPU_TOKENS // length) if device.type == "cpu" else config.data.batch_size

        def taken(count: int) -> float:
            images = _images(row, count, length // trial.spec.tokens_per_image)
            return seconds(device, partial(trial.passes, trial.batch(images, length, supervised)))

        alone = taken(1)  # the first call also allocates
        alone = min(alone, taken(1)) if alone < TRIAL_SECONDS else alone
        count = max(1, min(config.data.batch_size, most, int(TRIAL_SECONDS / alone)))
        # A GPU chooses its kernels at the first call with new sizes.
        times = GPU_TIMES if device.type == "cuda" else 1
        passes = min(taken(count) for _ in range(times)) if count > 1 else alone
        adamw = trial.adamw_seconds()
    except torch.OutOfMemoryError:
        return Estimate(None, "not measured: a batch of this recipe does not fit into memory")
    except Exception as error:  # an estimate must not end the statistics
        return Estimate(None, f"not measured: {' '.join(str(error).split())[:200] or type(error).__name__}")
    where = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else gpu_names()[device.index or 0]
    if device.type == "cuda":
        where += ", kernel by kernel; a run replays recorded steps, which takes less"
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1):
        where += ", which are busy with other work; on an idle machine training may be many times faster"
    return Estimate(
        passes / count * rows + adamw * steps,
        f"an estimate: {passes:.2f} s for {plural(count, 'synthetic row')} of {length} tokens and "
        f"{row.pictures:.2g} image{'s' * (row.pictures != 1)} each, forward and backward with random weights, and "
        f"{adamw:.3f} s for AdamW, measured just now on {where}; without reading, saving and other programs",
    )


def time_of(config: RunConfig, row: TypicalRow, rows: float, steps: int) -> dict[str, Any]:
    """`estimate` as a dict."""
    return asdict(estimate(config, row, rows, steps))


def _images(row: TypicalRow, rows: int, most: int) -> list[int]:
    """The number of images of each row; with 1.5 per row: one and two in turn."""
    ends = [int(number * row.pictures) for number in range(rows + 1)]
    return [min(end - begin, most) for begin, end in pairwise(ends)]
