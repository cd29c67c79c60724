"""Evaluation by a task during a run: the weights of a step are measured, and training does not notice.

Only a run with `eval_every` imports this module, and with it the statistics of an evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from minimind_v.core.config.schema import VALIDATION, RunConfig
from minimind_v.core.data.feature_cache import FeatureCache
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import MissingInput, RowError, UsageError, nearest
from minimind_v.core.evaluate.ask import BLANK
from minimind_v.core.evaluate.benchmarks import open_benchmark, read_picture
from minimind_v.core.evaluate.by_task import ChosenTask, choose_task, measure, prepare
from minimind_v.core.evaluate.results import gain_metric
from minimind_v.core.formats.checkpoint import Checkpoint, Receipt
from minimind_v.core.formats.load import LoadedModel
from minimind_v.core.model.vlm import VLM
from minimind_v.core.monitor.metrics import Best, Listener, TaskScores
from minimind_v.core.rows.row import RowStore
from minimind_v.core.rows.splits import LEARN
from minimind_v.core.train.run_folder import RunFolder
from minimind_v.core.wording import plural


class _Stopped(Exception):
    """The run was asked to stop during an evaluation."""


def choose_run_task(config: RunConfig) -> ChosenTask:
    """The task of a run. Raises UsageError or MissingInput, also where it has no metric of the name `best_by`."""
    assert config.eval_task is not None, "the configuration checks it"
    chosen = choose_task(config.eval_task)
    names = [metric.name for metric in chosen.task.metrics]
    if config.best_by and config.best_by not in (VALIDATION, *names):
        raise UsageError(
            f"--best-by {config.best_by} is neither {VALIDATION} nor a metric of the task {chosen.task.name} "
            f"({', '.join(names)}){nearest(config.best_by, names)}"
        )
    return chosen


def check_images(config: RunConfig, chosen: ChosenTask) -> None:
    """Raises MissingInput where the questions name images, and there are no --eval-images."""
    if config.eval_images is not None:
        return
    rows = _open_rows(config, chosen, Listener())
    for index in range(len(rows)):
        with suppress(RowError):
            row = rows.row(index)
            if row.shown:
                break
    else:
        return
    try:
        read_picture(rows, row, index, 0, row.shown[0])
    except RowError as error:
        if error.kind == "image missing":
            raise MissingInput(
                f"{config.eval_data}: its rows name images — give their folder, zip or tar with --eval-images"
            ) from None


def _open_rows(config: RunConfig, chosen: ChosenTask, listener: Listener) -> RowStore:
    assert config.eval_data is not None, "the configuration checks it"
    _, split = chosen.source(config.eval_data, None)
    return open_benchmark(config.eval_data, config.eval_images, split, listener.message, chosen.names)


def scores_of(report: dict[str, Any], chosen: ChosenTask, step: int, seconds: float) -> TaskScores:
    """The figures of an evaluation of the weights of a step."""
    metric = gain_metric(type(chosen.task))
    main = next(figure for figure in report["metrics"] if figure["name"] == metric.name)
    return TaskScores(
        step=step,
        **{key: report[key] for key in ("task", "data", "rows", "pictures", "visual_gain", "metrics", "predictions")},
        metric=metric.name,
        **{key: main[key] for key in ("value", "ci_low", "ci_high")},
        blank=report["variants"][BLANK],
        seconds=round(seconds, 2),
    )


def predictions_of(folder: Path, step: int) -> Path:
    """The folder of the predictions of a step, below one for all of them."""
    return folder / f"step-{step:010d}"


class Evaluator:
    """Measures the same questions at each call. Their images are encoded once, and no random number is drawn."""

    def __init__(
        self,
        config: RunConfig,
        chosen: ChosenTask,
        model: VLM,
        tokenizer: Tokenizer,
        features: FeatureCache,
        listener: Listener,
    ) -> None:
        """Reads the questions. Raises MissingInput, DataError or UsageError."""
        self.config, self.chosen, self.folder = config, chosen, RunFolder(config)
        weights = self.folder.weights  # what they will be; these are not on the disk
        checkpoint = Checkpoint(weights, {}, config.model, config.stage, ignored=[], guessed=False)
        self._loaded = LoadedModel(model, tokenizer, checkpoint, Receipt(str(weights)))
        rows = _open_rows(config, chosen, listener)
        if rows.path.resolve() == config.data.file.resolve() and rows.split in ("", *LEARN):
            listener.warning(
                f"evaluation: --eval-data are the training rows of {rows.path}, so the figures say nothing about new "
                f"images — name held-out rows"
            )
        self._prepared = prepare(
            self._loaded, chosen, rows, config.eval_limit, config.dtype, features,
            warn=lambda skipped: listener.warning(f"evaluation: {skipped}"),
        )  # fmt: skip
        plan = self._prepared.plan
        self.available = plan.available  # questions, without eval_limit
        listener.message(
            f"evaluation by {chosen.task.name} before the first step, every {config.eval_every} steps and after the "
            f"last: {plural(len(plan.questions), 'question')} about {plural(plan.pictures, 'image')}; "
            f"answers go to {self.folder.evaluations}"
        )

    def __call__(self, step: int, stopped: Callable[[], bool]) -> TaskScores | None:
        """Measure the present weights; None as soon as `stopped`. Raises RunError where answers cannot be written."""

        def check(done: int, total: int) -> None:
            if stopped():
                raise _Stopped

        model, begun = self._loaded.model, time.perf_counter()
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                folder = predictions_of(self.folder.evaluations, step)
                result = measure(self._loaded, self.chosen, self._prepared, folder, progress=check, replaces=True)
        except _Stopped:
            return None
        finally:
            model.train()
        return scores_of(result.report, self.chosen, step, time.perf_counter() - begun)

    def best_of(self, scores: TaskScores) -> Best | None:
        """The value by which the best weights are chosen; None where it is no number, or no metric decides."""
        name = self.config.best_by
        value = next((figure["value"] for figure in scores.metrics if figure["name"] == name), None)
        label = name if name == scores.task else f"{scores.task} {name}"
        by = f"{label} on {plural(scores.rows, 'question')} of {scores.data}"
        return None if value is None else Best(scores.step, by, value, self.chosen.task.lower_is_better)
