"""Whoever looks at a run besides the user: keeps what happens in `events.jsonl`, and finds words for the numbers.

A `Watch` stands between a run and its listener. What the run tells passes through and is kept; so is what the signs
say. A run that is resumed finds there what its earlier part has told.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from minimind_v.core.data.batch import Batch
from minimind_v.core.device import peak_memory
from minimind_v.core.errors import RunError
from minimind_v.core.monitor.diagnostics import Diagnostics, Start
from minimind_v.core.monitor.metrics import JsonLines, Listener, Recalled, StepMetrics, Validation, read_lines
from minimind_v.core.monitor.trackers import Tracker

Kept = TypeVar("Kept", Validation, Recalled)


class Watch:
    """A listener that keeps what it hears and passes it on."""

    def __init__(self, path: Path, listener: Listener) -> None:
        """`path` is written only from `begin` on; what is heard before is kept until then."""
        self.path, self.listener = path, listener
        self.signs: Diagnostics | None = None
        self.best: Validation | None = None
        self.recalled: dict[str, Recalled] = {}  # what was measured of rows: `before`, `after`, `own`
        self._tracker: Tracker | None = None
        self._file: JsonLines | None = None
        self._early: list[dict[str, Any]] = []
        self._step = 0

    def begin(self, start: Start, tracker: Tracker | None = None) -> None:
        """The run starts, or goes on after `start.done` updates. Raises RunError."""
        self._file = JsonLines(self.path, start.done)
        self._tracker = tracker
        events = list(read_lines(self.path))
        told = [event["sign"] for event in events if "sign" in event]
        validations = [_again(Validation, event["validation"]) for event in events if "validation" in event]
        self.best = min(validations, key=lambda validation: validation.loss, default=None)
        for event in events:
            self.recalled |= {when: _again(Recalled, rows) for when, rows in event.get("recalled", {}).items()}
        self.signs = Diagnostics(start, told, validations)
        self._step = start.done
        for event in self._early:
            self._keep(**event)

    def close(self) -> None:
        """The run has ended."""
        self._keep(memory_bytes=max(peak_memory()))
        for opened in (self._file, self._tracker):
            if opened:
                opened.close()

    # --- what a run tells ---------------------------------------------------------------------------------------------

    def say(self, message: str) -> None:
        self.listener.say(message)

    def warn(self, message: str) -> None:
        self._keep(warning=message)
        self.listener.warn(message)

    def batch(self, batch: Batch) -> None:
        """A batch that is about to be learnt from."""
        if self.signs:
            self.signs.batch(batch)

    def step(self, metrics: StepMetrics, log: bool) -> None:
        self._step = metrics.step
        self.listener.step(metrics, log)
        if self.signs:
            self._tell(self.signs.step(metrics))
        if self._tracker and log:
            self._track(tracked(metrics))

    def validated(self, found: Validation) -> None:
        if found.best:
            self.best = found
        self._keep(validation=asdict(found))
        self.listener.validated(found)
        if self.signs:
            self._tell(self.signs.validated(found))
        if self._tracker:
            swapped = {} if found.swapped_loss is None else {"validation/swapped_loss": found.swapped_loss}
            self._track({"validation/loss": found.loss, "validation/hits": found.hits} | swapped)

    def saved(self, step: int) -> None:
        self.listener.saved(step)

    def keep_recalled(self, when: str, found: Recalled | None) -> None:
        """What was measured `before` and `after` of rows that the weights had learnt, and of the run's `own`."""
        if found:
            self.recalled[when] = found
            self._keep(recalled={when: asdict(found)})

    # ------------------------------------------------------------------------------------------------------------------

    def _tell(self, lines: dict[str, str]) -> None:
        for sign, line in lines.items():
            self._keep(sign=sign, warning=line)
            self.listener.warn(f"step {self._step}: {line}")

    def _keep(self, **event: Any) -> None:
        if self._file is None:
            self._early.append(event)
            return
        with contextlib.suppress(RunError):  # a full disk is told of by what matters more
            self._file.write({"step": self._step} | event)

    def _track(self, values: dict[str, float]) -> None:
        assert self._tracker
        try:
            self._tracker.log(self._step, values)
        except Exception as error:  # somebody else's service must not end a run
            self._tracker = None
            self.warn(f"the tracker failed and is left alone from here on: {' '.join(str(error).split())[:200]}")


def _again(kind: type[Kept], record: dict[str, Any]) -> Kept:
    """What was kept of it; keys that only another version knows are left out."""
    names = {item.name for item in fields(kind)}
    return kind(**{key: value for key, value in record.items() if key in names})


def tracked(metrics: StepMetrics) -> dict[str, float]:
    """The figures of an update by the names that a tracker shows."""
    return {
        "train/loss": metrics.loss,
        "train/hits": metrics.hits,
        "train/lr": metrics.lr,
        "train/grad_norm": metrics.grad_norm,
        "train/epoch": metrics.epoch,
        "speed/samples_per_second": metrics.samples / max(metrics.seconds, 1e-9),
        "speed/tokens_per_second": metrics.tokens / max(metrics.seconds, 1e-9),
        "speed/waiting_for_data": metrics.data_seconds / max(metrics.seconds, 1e-9),
    }
