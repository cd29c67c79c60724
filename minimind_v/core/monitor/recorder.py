"""The recorder of a run: keeps its events in `events.jsonl`, and turns its numbers into warnings.

It stands between a run and its listener: every event passes through, and the diagnostics' warnings are added. A run
that is resumed reads its earlier warnings there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from minimind_v.core.data.batch import Batch
from minimind_v.core.device import peak_memory
from minimind_v.core.errors import RunError
from minimind_v.core.monitor.diagnostics import Diagnostics, Start
from minimind_v.core.monitor.metrics import (
    Best,
    JsonLines,
    Listener,
    Recalled,
    StepMetrics,
    TaskScores,
    Validation,
    read_lines,
)
from minimind_v.core.monitor.trackers import Tracker

Kept = TypeVar("Kept", Validation, Recalled, Best)


class Recorder(Listener):
    """A listener that keeps events and passes them on."""

    def __init__(self, path: Path, listener: Listener) -> None:
        """`path` is written from `begin` on; earlier events wait until then."""
        self.path, self.listener = path, listener
        self.diagnostics: Diagnostics | None = None
        self.best: Best | None = None
        self.evaluated_step: int | None = None  # of the last evaluation by a task
        self.recalled: dict[str, Recalled] = {}  # by `before`, `after`, `own`
        self._tracker: Tracker | None = None
        self._file: JsonLines | None = None
        self._early: list[dict[str, Any]] = []
        self._step = 0

    def begin(self, start: Start, tracker: Tracker | None = None) -> None:
        """The run starts, or is resumed after `start.done` steps. Raises RunError."""
        self._file = JsonLines(self.path, start.done)
        self._tracker = tracker
        events = list(read_lines(self.path))
        rules = [event["sign"] for event in events if "sign" in event]
        validations = [_restored(Validation, event["validation"]) for event in events if "validation" in event]
        for event in events:
            self.best = _restored(Best, event["best"]) if "best" in event else self.best
            self.evaluated_step = event["step"] if "evaluation" in event else self.evaluated_step
            self.recalled |= {when: _restored(Recalled, rows) for when, rows in event.get("recalled", {}).items()}
        self.diagnostics = Diagnostics(start, rules, validations)
        self._step = start.done
        for event in self._early:
            self._keep(**event)

    def close(self) -> None:
        self._keep(memory_bytes=max(peak_memory()))
        for opened in (self._file, self._tracker, self.listener):
            if opened:
                opened.close()

    # --- events -------------------------------------------------------------------------------------------------------

    def message(self, text: str) -> None:
        self.listener.message(text)

    def warning(self, text: str) -> None:
        self._keep(warning=text)
        self.listener.warning(text)

    def lost(self, text: str) -> None:
        self._keep(warning=text)
        self.listener.lost(text)

    def batches(self, batches: Sequence[Batch]) -> None:
        self.listener.batches(batches)
        if self.diagnostics:
            self.diagnostics.batches(batches)

    def step(self, metrics: StepMetrics, logged: bool) -> None:
        self._step = metrics.step
        self.listener.step(metrics, logged)
        if self.diagnostics:
            self._warn(self.diagnostics.step(metrics))
        if self._tracker and logged:
            self._track(tracked(metrics))

    def validated(self, result: Validation) -> None:
        self._keep(validation=asdict(result))
        self.listener.validated(result)
        if self.diagnostics:
            self._warn(self.diagnostics.validated(result))
        if self._tracker:
            swapped = {} if result.swapped_loss is None else {"validation/swapped_loss": result.swapped_loss}
            accuracy = {"validation/token_accuracy": result.token_accuracy}
            self._track({"validation/loss": result.loss} | accuracy | swapped)

    def evaluated(self, scores: TaskScores) -> None:
        self._keep(evaluation=asdict(scores))
        self.listener.evaluated(scores)
        if self._tracker:
            self._track({f"evaluation/{name}": value for name, value in scores.figures.items()})

    def keep_best(self, best: Best) -> None:
        """Note which weights are kept as the best."""
        self._keep(best=asdict(best))

    def saved(self, step: int) -> None:
        self._keep(step=step, saved=True)
        self.listener.saved(step)

    def recall(self, when: str, result: Recalled | None) -> None:
        """Keep a measurement of earlier training rows (`before`, `after`) or of the run's `own`."""
        if result:
            self.recalled[when] = result
            self._keep(recalled={when: asdict(result)})

    # ------------------------------------------------------------------------------------------------------------------

    def _warn(self, lines: dict[str, str]) -> None:
        for rule, line in lines.items():
            self._keep(sign=rule, warning=line)
            self.listener.warning(f"step {self._step}: {line}")

    def _keep(self, **event: Any) -> None:
        if self._file is None:
            self._early.append(event)
            return
        with contextlib.suppress(RunError):  # a save reports a full disk
            self._file.write({"step": self._step} | event)

    def _track(self, values: dict[str, float]) -> None:
        assert self._tracker
        try:
            self._tracker.log(self._step, values)
        except Exception as error:  # another service must not end a run
            self._tracker = None
            self.lost(f"the tracker failed and is no longer used: {' '.join(str(error).split())[:200]}")


def _restored(kind: type[Kept], record: dict[str, Any]) -> Kept:
    """The object of a record, without the keys of other versions."""
    names = {item.name for item in fields(kind)}
    return kind(**{key: value for key, value in record.items() if key in names})


def tracked(metrics: StepMetrics) -> dict[str, float]:
    """The metrics of a step by their names in a tracker."""
    return {
        "train/loss": metrics.loss,
        "train/token_accuracy": metrics.token_accuracy,
        "train/lr": metrics.lr,
        "train/grad_norm": metrics.grad_norm,
        "train/epoch": metrics.epoch,
        "speed/samples_per_second": metrics.samples / max(metrics.seconds, 1e-9),
        "speed/tokens_per_second": metrics.tokens / max(metrics.seconds, 1e-9),
        "speed/waiting_for_data": metrics.data_seconds / max(metrics.seconds, 1e-9),
    }
