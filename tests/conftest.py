"""What tests of several folders share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from torch.utils.data import Dataset

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.batch import Batch
from minimind_v.core.model.vlm import VLM
from minimind_v.core.monitor.metrics import StepMetrics, Validation
from minimind_v.core.train import run as loop
from minimind_v.core.train.build import Data, Loaded
from minimind_v.core.train.run import Run


class Recorder:
    """A listener that keeps all that a run tells."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.steps: list[StepMetrics] = []
        self.validations: list[Validation] = []
        self.saves: list[int] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def step(self, metrics: StepMetrics, log: bool) -> None:
        self.steps.append(metrics)

    def validated(self, found: Validation) -> None:
        self.validations.append(found)

    def saved(self, step: int) -> None:
        self.saves.append(step)


class GivenBatches(Dataset[list[Batch]]):
    """A data plan of batches that exist already, the same in every epoch."""

    pad_id = 0
    prefetch = 2

    def __init__(self, batches: list[Batch], config: RunConfig) -> None:
        self.batches, self.accumulate, self.epochs = batches, config.accumulate, config.epochs
        self.steps_per_epoch = -(-len(batches) // config.accumulate)
        self.dataset = range(sum(map(len, batches)))  # a run asks only how many rows there are
        self.rows = len(self.dataset)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __getitem__(self, number: int) -> list[Batch]:
        begin = number % self.steps_per_epoch * self.accumulate
        return self.batches[begin : begin + self.accumulate]


class GivenRun(Run):
    """The real training run over a model and batches that exist already."""

    def __init__(self, config: RunConfig, model: VLM, batches: list[Batch]) -> None:
        self.recorder = Recorder()
        data, loaded = Data(None, None, GivenBatches(batches, config), None), Loaded(model, False, False)
        with (
            mock.patch.object(loop, "open_data", return_value=data),
            mock.patch.object(loop, "build_model", return_value=loaded),
        ):
            super().__init__(config, self.recorder)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def run_over() -> type[GivenRun]:
    """`run_over(config, model, batches)` is a run whose `fit()` trains that model on those batches."""
    return GivenRun


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
