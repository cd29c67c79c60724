"""Recall: the accuracy of a run on few rows on its own rows, and on earlier training rows before and after it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minimind_v.core.config.load import build_config
from minimind_v.core.config.schema import RunConfig, TextConfig
from minimind_v.core.data.feature_store import FeatureStore
from minimind_v.core.data.loader import BatchPlan
from minimind_v.core.errors import MmvError, UsageError
from minimind_v.core.files import read_notes
from minimind_v.core.formats.companions import run_folder_of, run_settings, trouble_of_run
from minimind_v.core.formats.description import shaped_sizes
from minimind_v.core.monitor.messages import recalled
from minimind_v.core.monitor.metrics import Recalled
from minimind_v.core.monitor.recorder import Recorder
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.run_folder import RunFolder
from minimind_v.core.train.step import TrainStep
from minimind_v.core.train.validate import Validator

BATCH = 8  # rows at a time
OWN_ROWS = 100  # of a run's own rows, so many at most are measured


@dataclass(frozen=True)
class Earlier:
    """The training rows of the weights of `init`."""

    file: Path
    images: Path | None
    tokenizer: str | None = None  # the fingerprint of the weights' tokenizer, where it is known


def earlier_run(init: Path | None, model: TextConfig) -> Earlier | None:
    """The training rows of weights of this model, from the folder of their run.

    Published weights have no such folder: theirs are the published rows. None if neither exists.
    """
    if init is None:
        return None
    folder = run_folder_of(init)
    notes = read_notes(folder / "manifest.json")
    try:
        if trouble := trouble_of_run(folder, shaped_sizes(model)):
            raise UsageError(trouble)
        config = run_settings(folder)
        file, images = Path(config["data.file"]), config["data.images"] and Path(config["data.images"])
        started = Path(notes["starts"][-1]["folder"])
        if not file.exists():  # relative to the folder where that run was started
            file, images = started / file, images and started / images
        return Earlier(file, images, notes["fingerprints"].get("data.tokenizer"))
    except (OSError, KeyError, TypeError, AttributeError, IndexError, MmvError):
        published = build_config("pretrain" if init.name.startswith("pretrain") else "sft").data
        return Earlier(published.file, published.images) if published.file.exists() else None


class Recall:
    """Measures rows without training on them. It draws no random number."""

    def __init__(self, name: str, plan: BatchPlan, dtype: str) -> None:
        self.name, self.rows = name, plan.rows
        self._validate = Validator(plan, dtype, swapped=False)

    def __call__(self, train_step: TrainStep) -> Recalled | None:
        """Loss and token accuracy; None where no row can be used."""
        result = self._validate(train_step.model, train_step.features.features, 0)
        if result is None:
            return None
        return Recalled(self.name, result.rows, result.loss, result.token_accuracy)


class RecallReport:
    """Measures a sample of earlier training rows before the run, and again after it with the run's own rows."""

    def __init__(
        self,
        config: RunConfig,
        plan: BatchPlan,
        train_step: TrainStep,
        recorder: Recorder,
        loaded: bool,
        processes: int = 1,
    ) -> None:
        """`loaded` says that the run started from weights, and not from random numbers."""
        self.config, self.plan, self.train_step, self.recorder = config, plan, train_step, recorder
        self.loaded, self.processes = loaded, processes
        self._earlier: Recall | str = ""  # earlier training rows, or why none are measured

    def before(self, done: int) -> None:
        """Measure before the first step; a resumed run (`done` steps) has done so."""
        self._earlier = self._find_earlier()
        if isinstance(self._earlier, Recall) and not done:
            sample = f"{self._earlier.rows} rows of {self._earlier.name}"
            self.recorder.message(f"measuring the accuracy of {self.config.init} on {sample}")
            self.recorder.recall("before", self._earlier(self.train_step))

    def _find_earlier(self) -> Recall | str:
        if self.processes > 1:
            return "not measured with several processes"
        if self.config.init is None or not self.loaded:
            return "the run started from random weights"
        return recall_earlier(self.config, self.plan, self.train_step.features.store)

    def after(self) -> None:
        """Measure again, and report the change."""
        config, recorder, earlier = self.config, self.recorder, self._earlier
        try:
            if self.processes == 1:
                recorder.recall("own", recall_own(config, self.plan)(self.train_step))
            if isinstance(earlier, Recall) and "before" in recorder.recalled:
                recorder.recall("after", earlier(self.train_step))
        except MmvError as error:  # a row that is broken by now must not fail a finished run
            recorder.lost(f"learning and forgetting were not measured: {error}")
            return
        why = earlier if isinstance(earlier, str) else "the rows could not be measured before the run"
        messages, warnings = recalled(config, RunFolder(config).weights, recorder.recalled, why)
        for line in messages:
            recorder.message(line)
        for line in warnings:
            recorder.warning(line)


def recall_own(config: RunConfig, plan: BatchPlan, most: int = OWN_ROWS) -> Recall:
    """The training rows of the run, so many at most."""
    return Recall(
        str(config.data.file),
        BatchPlan(plan.dataset.for_evaluation(), BATCH, plan.pad_id, keep=plan.kept, limit=most),
        config.dtype,
    )


def recall_earlier(config: RunConfig, plan: BatchPlan, store: FeatureStore | None) -> Recall | str:
    """A sample of earlier training rows, drawn by the run's seed; or why there is none."""
    earlier = earlier_run(config.init, config.model)
    if earlier is None:
        return f"the training rows of {config.init} are not recorded, and the published rows are not on this machine"
    if not earlier.file.exists():
        return f"{earlier.file}, the training data of {config.init}, does not exist"
    if earlier.file.resolve() == config.data.file.resolve():
        return f"{config.init} was trained on these same rows"
    own = plan.dataset
    try:
        rows = open_rows(earlier.file, earlier.images)
        keep = np.zeros(len(rows), bool)
        keep[rows.shuffled(np.random.default_rng(config.seed))[: config.recall_rows]] = True
        dataset = copy.copy(own.for_evaluation())
        dataset.rows, dataset.remembered = rows, store
    except MmvError as error:
        return str(error)
    return Recall(str(earlier.file), BatchPlan(dataset, BATCH, plan.pad_id, keep=keep), config.dtype)
