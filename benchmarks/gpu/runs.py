"""The real training run over the material, stopped by a listener; and what a listener can do on its way."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any
from unittest import mock

from benchmarks.gpu.card import Card
from benchmarks.gpu.material import SEED
from minimind_v.core.config.load import build_config
from minimind_v.core.config.recipes import NO_INIT
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.loader import load_steps
from minimind_v.core.data.vision_stage import encode_ahead
from minimind_v.core.monitor.metrics import Listener, StepMetrics
from minimind_v.core.train import run as run_module
from minimind_v.core.train.loop import Run

EPOCHS = 1000  # so that a run ends when its listener says so


class StepListener(Listener):
    """Calls a function after every step, which may stop the run."""

    def __init__(self, on_step: Callable[[StepMetrics], bool] = lambda _: False) -> None:
        self.on_step = on_step
        self.run: Run | None = None
        self.losses: list[float] = []
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.messages.append(text)

    def step(self, metrics: StepMetrics, logged: bool) -> None:
        self.losses.append(metrics.loss)
        # On a card one step more was launched before the run was stopped.
        if metrics.step <= self.run.total and self.on_step(metrics):
            self.run.total = metrics.step


def configure(card: Card, preset: str, stage: str, data: str | None = None, **options: Any) -> RunConfig:
    """The recipe of a stage over the material; `data` names other rows than the stage's."""
    data = data or stage
    given = {
        "data.file": card.folder / f"{data}.jsonl",
        "data.images": card.folder / f"{data}.zip",
        "data.tokenizer": card.folder / "tokenizer",
        "data.workers": 1 if card.tiny else None,
        "data.batch_size": 2 if card.tiny else None,
        "data.max_length": (300 if stage == "pretrain" else 800) if card.tiny else None,
        "vision_model": card.folder / "vision",
        "init": card.folder / "weights.safetensors" if preset == "small" else NO_INIT,
        "out": card.folder / "out",
        "features": "off",
        "features_dir": card.folder / "features",
        "epochs": EPOCHS,
        "save_every": 0,
        "seed": SEED,
        "device": str(card.device),
    }
    config = build_config(stage, options=given | options)
    return replace(config, model=card.text(preset))


def make_run(config: RunConfig, listener: StepListener, saves: bool = False, compiled: bool = False, **how: Any) -> Run:
    """The run, ready to start. Unless it `saves` it leaves nothing behind: saving is not what is measured.

    Its decoder is `compiled` or not, however many steps it has.
    """
    with mock.patch.object(run_module, "WORTH_COMPILING", 0 if compiled else float("inf")):
        run = run_module.assemble(config, listener, **({"overwrite": True} | how))
    if not saves:
        run.saver = run.records = None
    listener.run = run
    return run


class Window:
    """A listener's function that measures updates: some to warm up, then all for so many seconds."""

    def __init__(self, seconds: float, warm_seconds: float = 2.0, warm_steps: int = 10) -> None:
        self.limit, self.warm_seconds, self.warm_steps = seconds, warm_seconds, warm_steps
        self.begun = time.perf_counter()
        self.first: StepMetrics | None = None  # where measuring begins
        self.last: StepMetrics | None = None
        self.times: list[float] = []  # of each update, in seconds
        self._then = 0.0

    def __call__(self, metrics: StepMetrics) -> bool:
        now = time.perf_counter()
        if self.first is None:
            if metrics.step == 1:
                self.begun = now
            if metrics.step >= self.warm_steps and now - self.begun >= self.warm_seconds:
                self.first, self._then, self.begun = metrics, now, now
            return False
        self.times.append(now - self._then)
        self._then, self.last = now, metrics
        return now - self.begun >= self.limit

    @property
    def seconds(self) -> float:
        return sum(self.times)

    def difference(self, name: str) -> float:
        """What was added meanwhile to one of the counts of StepMetrics."""
        assert self.first
        assert self.last
        return getattr(self.last, name) - getattr(self.first, name)


def store_features(card: Card, stage: str) -> None:
    """Encode and store all images of a stage, so that each later run reads them."""
    run = make_run(configure(card, "small", stage, features="exact", epochs=1), StepListener())
    features = run.train_step.features
    with closing(load_steps(run.plan, run.config.data.workers, card.cuda)) as steps:
        for batches in encode_ahead(steps, features):
            for batch in batches or ():
                features.features(batch.to(card.device))
    features.flush()


def row_numbers(run: Run, steps: int) -> list[int]:
    """Which rows the first updates of a run read, in their order, from 0."""
    locations = [location for number in range(steps) for batch in run.plan[number] for location in batch.locations]
    return [int(location.rpartition(":")[2]) - 1 for location in locations]
