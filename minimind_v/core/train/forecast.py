"""What a run will take, before hours are spent on it: counted from its rows and measured in a few of its updates."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minimind_v.core.config.load import plain
from minimind_v.core.config.recipes import NO_INIT
from minimind_v.core.config.schedule import peak
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.curate.stats import Outlook, foresee
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.device import peak_memory
from minimind_v.core.files import write_text
from minimind_v.core.model.vision.encoder import read_vision_spec
from minimind_v.core.monitor.messages import too_little
from minimind_v.core.monitor.metrics import Silent, StepMetrics
from minimind_v.core.pages.run_report import disk_used
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.run import Run
from minimind_v.core.train.run_folder import RunFolder

SECONDS = 30.0  # that the measured updates may take, once there are ENOUGH
ENOUGH = 3  # updates that must be measured
WARM, MOST = {"cuda": 10}, {"cuda": 300}  # updates that are not measured, and that may be; a GPU does them quickly
WARM_ELSEWHERE, MOST_ELSEWHERE = 2, 20


@dataclass(frozen=True)
class Forecast:
    """What a run will take. Its report sets it beside what happened, by these names."""

    stage: str
    updates: int
    samples: int
    tokens: int  # real ones, of all epochs, placeholders included
    supervised_tokens: int
    seconds: float
    memory_bytes: int  # the most that one process held in the measured updates
    disk_bytes: int  # weights, states and records
    price_per_hour: float | None
    cost: float | None
    how: str  # it is known
    learning_rate: list[float]  # of the first update, and what it falls to
    warning: str | None  # what is known to go wrong
    config: dict[str, Any]


def plan(
    config: RunConfig,
    price_per_hour: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda message: None,
) -> Forecast:
    """Foretell a run, and leave the forecast in the run's folder, where its report looks for it.

    Rows are counted as the first epoch reads them (a sample of very many); then the real run does a few updates in a
    folder of its own, from random weights, which take as long as any. Raises what a run raises.
    """
    tokenizer, spec = Tokenizer.load(config.data.tokenizer, config.data.layout), read_vision_spec(config.vision_model)
    rows = open_rows(config.data.file, config.data.images, config.data.split, say)
    outlook = foresee(rows, PromptEncoder(tokenizer, spec.tokens_per_image), config, progress=progress)
    updates = min(outlook.updates, config.max_steps or outlook.updates)
    first = min(outlook.updates // config.epochs, updates)  # in the epoch that looks at the pictures
    watch, later, memory, disk = _measure(config, updates, first)
    tokens, new = (_of_run(outlook, count, outlook.counted.kept) for count in (updates, first))
    seconds = (watch.per_token * new + later.per_token * (tokens - new)) / config.gpus
    remembered = ", and once more with the pictures remembered, as in later epochs" if later is not watch else ""
    several = f", {config.gpus} processes taken for {config.gpus} times as fast as one" if config.gpus > 1 else ""
    most = "; the run ends once every answer is right, so this is the most that it takes" if config.until_right else ""
    forecast = Forecast(
        config.stage,
        updates,
        _of_run(outlook, updates, outlook.counted.used),
        tokens,
        _of_run(outlook, updates, outlook.counted.supervised),
        seconds,
        memory,
        disk,
        price_per_hour,
        None if price_per_hour is None else price_per_hour * seconds / 3600,
        f"{watch.measured} updates of the real run, measured on this machine, reading included{remembered}: "
        f"{seconds / updates:.2f} s for one of average length{several}; saving and validation are not in the time, "
        f"and longer rows than those measured may need more memory{most}",
        [peak(config.lr), config.lr / 10],
        too_little(config, len(rows), updates),
        plain(config),
    )
    told = json.dumps(asdict(forecast), indent=1, ensure_ascii=False)
    write_text(RunFolder(config).folder / "forecast.json", f"{told}\n")
    return forecast


class Stopwatch(Silent):
    """Listens to a few updates of a run, and then ends it."""

    run: Run

    def __init__(self) -> None:
        self.warm: StepMetrics | None = None  # where measuring begins
        self.last: StepMetrics | None = None

    def step(self, metrics: StepMetrics, log: bool) -> None:
        self.last = metrics
        kind = self.run.device.type
        if metrics.step <= min(WARM.get(kind, WARM_ELSEWHERE), metrics.steps - 1):
            self.warm = metrics
            return
        spent = metrics.seconds - (self.warm.seconds if self.warm else 0.0)
        if self.measured >= MOST.get(kind, MOST_ELSEWHERE) or (self.measured >= ENOUGH and spent > SECONDS):
            self.run.total = metrics.step

    @property
    def measured(self) -> int:
        """Updates."""
        assert self.last
        return self.last.step - (self.warm.step if self.warm else 0)

    @property
    def per_token(self) -> float:
        """Seconds for a token of a row."""
        assert self.last
        seconds, tokens = (self.warm.seconds, self.warm.tokens) if self.warm else (0.0, 0)
        return (self.last.seconds - seconds) / max(self.last.tokens - tokens, 1)


def _measure(config: RunConfig, updates: int, first: int) -> tuple[Stopwatch, Stopwatch, int, int]:
    """A few updates of the real run, as they are in its first epoch, whose updates are `first`, and in later ones.

    Besides what they held of memory, and what a whole run will have on the disk.
    """
    watch = later = Stopwatch()
    with tempfile.TemporaryDirectory(prefix="mmv-plan-") as folder:
        few = replace(
            config, out=Path(folder), init=NO_INIT, save_every=0, save_minutes=0, val_every=0, until_right=False,
            recall_rows=0, track="none", gpus=1,
            max_steps=min(updates, max(first, max(WARM.values()) + ENOUGH)),
        )  # fmt: skip
        watch.run = run = Run(few, watch)
        run.fit()
        state = sum(path.stat().st_size for path in run.place.states.paths())
        best = run.place.weights.stat().st_size if config.val_every else 0
        saves = -(-updates // config.save_every) if config.save_every else 1
        memory, disk = max(peak_memory()), disk_used(run.place.folder) + best + (min(config.keep, saves) - 1) * state
        if updates > first and run.memory.store is not None:
            later = Stopwatch()
            later.run = Run(replace(few, max_steps=run.done), later, overwrite=True)
            later.run.fit()
        return watch, later, memory, disk


def _of_run(outlook: Outlook, updates: int, counted: int) -> int:
    """What was counted in the rows looked at, for so many updates of the run."""
    return round(counted / outlook.looked_at * outlook.seen_rows * updates / outlook.updates)
