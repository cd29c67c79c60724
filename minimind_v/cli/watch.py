"""`mmv eval --watch`: measure a run that trains in another process, whenever it has saved weights."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal
from minimind_v.core.paths import OUT_DIR

if TYPE_CHECKING:
    from minimind_v.core.evaluate.by_task import ChosenTask, Prepared
    from minimind_v.core.formats.load import LoadedModel
    from minimind_v.core.monitor.metrics import TaskScores
    from minimind_v.core.rows.row import RowStore
    from minimind_v.core.train.watch import SavedWeights


@dataclass(frozen=True)
class Measuring:
    """How the weights of a run are measured."""

    chosen: ChosenTask
    data: Path
    images: Path | None
    split: str | None
    limit: int | None
    dtype: str
    vision_model: Path | None
    tokenizer: Path | None
    device: str


def watch_run(terminal: Terminal, run_path: Path, how: Measuring, json: bool) -> None:
    """Measure all weights that a run saves, until it ends; write a line for each."""
    from minimind_v.core.device import pick_device
    from minimind_v.core.errors import open_all
    from minimind_v.core.evaluate.benchmarks import open_benchmark
    from minimind_v.core.evaluate.by_task import measuring_digest
    from minimind_v.core.monitor.metrics import describe_scores
    from minimind_v.core.rows.pictures import find_pictures
    from minimind_v.core.rows.stores import find_rows
    from minimind_v.core.train.watch import WatchedRun, watch

    run, _, _ = open_all(
        lambda: WatchedRun.find(run_path, options.folder("out", OUT_DIR)),
        lambda: find_rows(how.data),
        lambda: find_pictures(how.images),
    )
    pick_device(how.device)  # a wrong one is refused before the run has weights
    rows = open_benchmark(how.data, how.images, how.split, terminal.say, how.chosen.names)
    digest = measuring_digest(how.chosen.task, how.data, how.split, how.limit, how.dtype)
    name = f"{how.chosen.task.name}-{how.data.stem}-{digest}"
    measure = WeightsTask(terminal, how, rows, run.folder / "eval" / name)
    for scores in watch(run, measure, terminal.say):
        if json:
            terminal.json(asdict(scores))
        else:
            terminal.result(f"step {scores.step}  {describe_scores(scores)}")


class WeightsTask:
    """Measures weights by a task. The model is built and the images are encoded once."""

    def __init__(self, terminal: Terminal, how: Measuring, rows: RowStore, folder: Path) -> None:
        """`folder` gets the answers, in a folder for each step."""
        self.terminal, self.how, self.rows, self.folder = terminal, how, rows, folder
        self._opened: tuple[LoadedModel, Prepared] | None = None

    def __call__(self, saved: SavedWeights) -> TaskScores | None:
        """The figures; None where the weights were replaced while they were read."""
        from minimind_v.core.evaluate.by_task import measure
        from minimind_v.core.formats.checkpoint import load_into, read_checkpoint
        from minimind_v.core.train.evaluator import predictions_of, scores_of

        self._opened = self._opened or self._open(saved.path)
        loaded, prepared = self._opened
        load_into(loaded.model, read_checkpoint(saved.path))
        if not saved.unchanged:
            return None
        begun, how = time.perf_counter(), self.how
        with self.terminal.progress(f"step {saved.step}, answers") as progress:
            folder = predictions_of(self.folder, saved.step)
            result = measure(loaded, how.chosen, prepared, folder, progress=progress, replaces=True)
        return scores_of(result.report, how.chosen, saved.step, time.perf_counter() - begun)

    def _open(self, weights: Path) -> tuple[LoadedModel, Prepared]:
        from minimind_v.core.evaluate.by_task import prepare

        how, terminal = self.how, self.terminal
        loaded = options.load(weights, how.vision_model, how.tokenizer, how.device, terminal.say)
        return loaded, prepare(
            loaded, how.chosen, self.rows, how.limit, how.dtype, say=terminal.say, warn=terminal.warn
        )
