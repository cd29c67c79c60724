"""What tests of several folders share."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
from torch.utils.data import Dataset

from minimind_v.core.config.load import resolve
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.curate import workers
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureCache
from minimind_v.core.device import pick_device
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.vlm import VLM
from minimind_v.core.monitor.metrics import Listener, StepMetrics, TaskScores, Validation
from minimind_v.core.train.loop import Run
from minimind_v.core.train.run import train
from minimind_v.core.train.step import TrainStep


class Events(Listener):
    """A listener that keeps all events of a run."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self.steps: list[StepMetrics] = []
        self.validations: list[Validation] = []
        self.evaluations: list[TaskScores] = []
        self.saves: list[int] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, metrics: StepMetrics, logged: bool) -> None:
        self.steps.append(metrics)

    def validated(self, result: Validation) -> None:
        self.validations.append(result)

    def evaluated(self, scores: TaskScores) -> None:
        self.evaluations.append(scores)

    def saved(self, step: int) -> None:
        self.saves.append(step)


class Killed(Events):
    """Ends a run after a step, before the next one: nothing is saved any more, as after a kill."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def batches(self, batches: Sequence[Batch]) -> None:
        if self.steps and self.steps[-1].step >= self.after:
            raise KeyboardInterrupt


def train_until_killed(after: int, command: Sequence[object], resume: bool = False) -> Killed:
    """Train in this process as a command line says, and end the run after a step, as a kill does."""
    _, stage, *rest = map(str, command)
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    options = {name[2:].replace("-", "_"): value for name, value in pairs if name != "--set"}
    resolved = resolve(stage, None, options, [value for name, value in pairs if name == "--set"])
    listener = Killed(after)
    with pytest.raises(KeyboardInterrupt):
        train(resolved.config, listener, resume=resume, auto=resolved.auto)
    return listener


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let Ctrl-C come in the middle of a step of runs in this process."""
    launch = Run._launch

    def interrupted(run: Run, number: int, batches: list[Batch]) -> object:
        if number == step:
            raise KeyboardInterrupt
        return launch(run, number, batches)

    monkeypatch.setattr(Run, "_launch", interrupted)


class GivenBatches(Dataset[list[Batch]]):
    """A data plan of batches that exist already, the same in every epoch."""

    pad_id = 0
    prefetch = 2

    def __init__(self, batches: list[Batch], config: RunConfig) -> None:
        self.batches, self.accumulate, self.epochs = batches, config.accumulate, config.epochs
        self.steps_per_epoch = -(-len(batches) // config.accumulate)
        self.dataset = range(sum(map(len, batches)))  # a run asks only how many rows there are
        self.rows = len(self.dataset)
        self.rows_per_step = -(-self.rows // self.steps_per_epoch)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __getitem__(self, number: int) -> list[Batch]:
        begin = number % self.steps_per_epoch * self.accumulate
        return self.batches[begin : begin + self.accumulate]


def given_run(config: RunConfig, model: VLM, batches: list[Batch], listener: Listener) -> Run:
    """The real training loop over a model and batches that exist already; it leaves nothing on the disk."""
    device = pick_device(config.device)
    train_step = TrainStep(config, accelerate(model.to(device), device), FeatureCache())
    return Run(config, GivenBatches(batches, config), train_step, listener)


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def run_over(events: Events) -> Callable[[RunConfig, VLM, list[Batch]], Run]:
    """`run_over(config, model, batches)` is a run of that model over those batches, which reports to `events`."""
    return lambda config, model, batches: given_run(config, model, batches, events)


@pytest.fixture(autouse=True)
def forked_workers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Rows are checked in forks where a system has them: a new process spends three seconds on the import of torch."""
    start = workers.START if request.path.name == "test_workers.py" else multiprocessing.get_all_start_methods()[0]
    with mock.patch.object(workers, "START", start):
        yield


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test sets in the environment ends with it; with other settings no later command could be forked."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(megabytes)` is the folder of a disk that is no larger; skips where none can be mounted."""
    mounted: list[Path] = []

    def mount(megabytes: int) -> Path:
        disk = tmp_path / f"disk{len(mounted)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no small disk can be mounted here")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)
