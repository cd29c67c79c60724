"""What a run tells about itself: one record per update, kept as JSON lines and shown by whoever listens."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from minimind_v.core.errors import RunError
from minimind_v.core.files import write_text


@dataclass(frozen=True)
class StepMetrics:
    """One update. Counts and seconds add up from the start of the run."""

    step: int  # from 1
    steps: int  # of the whole run
    epoch: float  # epochs done after this update
    loss: float  # nats per supervised token of this update, with the auxiliary loss
    hits: float  # share of this update's supervised tokens that were the likeliest
    lr: float
    grad_norm: float  # before clipping
    samples: int
    tokens: int  # real tokens read, placeholders included
    supervised_tokens: int
    seconds: float
    data_seconds: float  # of these, spent waiting for data

    @property
    def seconds_left(self) -> float:
        return self.seconds / self.step * (self.steps - self.step)


class Listener(Protocol):
    """Whoever wants to know how a run goes."""

    def say(self, message: str) -> None:
        """Something worth a line."""

    def warn(self, message: str) -> None:
        """Something that the user should act upon."""

    def step(self, metrics: StepMetrics, log: bool) -> None:
        """An update is done; `log` says that it is one of every log_every."""


class Silent:
    """A listener for those processes of a run that do not lead it."""

    def say(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    def step(self, metrics: StepMetrics, log: bool) -> None: ...


class MetricsFile:
    """`metrics.jsonl`: a line per logged update, each flushed. A resumed run keeps the lines up to where it goes on."""

    def __init__(self, path: Path, after: int = 0) -> None:
        kept = _lines_until(path, after) if after and path.is_file() else []
        if path.is_file() and not path.is_symlink():
            write_text(path, "".join(kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Raises RunError where there is no room; the line is kept, and written with the next one that finds some."""
        try:
            self._file.write(json.dumps(asdict(metrics)) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self.path}: not written ({error.strerror})") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # told when it was written
            self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines about the first updates. A kill may have left lines of later ones, and half a line."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    return kept
