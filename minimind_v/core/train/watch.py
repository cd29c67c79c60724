"""A run that trains in another process: its weights are measured whenever it has written new ones.

A save writes first the state, whose name has the step, and then the weights, each by a rename. So the weights are those
of the newest state exactly if they are not older than it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from minimind_v.core.errors import MissingInput, RunError
from minimind_v.core.files import is_locked, read_notes
from minimind_v.core.monitor.metrics import TaskScores, read_lines
from minimind_v.core.monitor.records import EVALUATIONS
from minimind_v.core.pages.run_report import find_run
from minimind_v.core.train.resume import States

PAUSE = 0.5  # seconds between two looks at the files


@dataclass(frozen=True)
class SavedWeights:
    """A weights file, as it was at one moment."""

    path: Path
    step: int
    stamp: tuple[int, int]  # inode and time of the last change

    @property
    def unchanged(self) -> bool:
        """Whether the file is still the same."""
        return stamp_of(self.path) == self.stamp


def stamp_of(path: Path) -> tuple[int, int] | None:
    """What differs after a file was replaced; None without a file."""
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


class WatchedRun:
    """The files of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.weights = self.folder.parent / f"{self.folder.name}.pth"
        self._lock = self.folder.parent / f".{self.folder.name}.lock"
        self._states = States(self.folder / "states", keep=1)

    @classmethod
    def find(cls, path: Path, out: Path) -> WatchedRun:
        """The run at a path, or of this name in the folder `out`. Raises MissingInput where none has begun."""
        for folder in (path, out / path):
            run = cls(folder)
            if run.is_running:  # perhaps without any record
                return run
            with suppress(MissingInput):
                return cls(find_run(folder))
        raise MissingInput(
            f"no run at {path} has begun — start it with `mmv train`, then watch it by its folder or by the name that "
            f"`mmv runs` shows"
        )

    @property
    def is_running(self) -> bool:
        """Whether a process holds the lock of the run."""
        return is_locked(self._lock)

    def saved(self, running: bool) -> SavedWeights | None:
        """The weights of the run on the disk; None where there are none, or a save is about to replace them."""
        stamp = stamp_of(self.weights)  # before the state: a save in between gives a state that is newer
        state = next(iter(self._states.paths()), None)
        written = stamp_of(state) if state else None
        if stamp is None or state is None or written is None:
            return None
        if running and stamp[1] < max(written[1], self._begun()):
            return None
        return SavedWeights(self.weights, self._states.step_of(state), stamp)

    def _begun(self) -> int:
        """When the run began with other weights than those on the disk, which are an earlier run's; 0: it did not."""
        starts = read_notes(self.folder / "manifest.json").get("starts") or [{}]
        begun = stamp_of(self.folder / "config.yaml")
        return 0 if begun is None or starts[-1].get("after_updates") else begun[1]

    def describe_end(self) -> str:
        """How far the run came, in words."""
        records = list(read_lines(self.folder / "metrics.jsonl"))
        if not records:
            return f"{self.folder} has ended before its first step"
        saved = self.saved(running=True)
        step, steps = max(records[-1]["step"], saved.step if saved else 0), records[-1].get("steps", 0)
        if step >= steps:
            return f"{self.folder} has ended after all {step} steps"
        return f"{self.folder} was stopped at step {step} of {steps} — `mmv train … --resume` continues it"

    def note(self, scores: TaskScores) -> None:
        """Add a line to the run's evaluations. Raises RunError."""
        path = self.folder / EVALUATIONS
        line = json.dumps({"step": scores.step, "evaluation": asdict(scores)}) + "\n"
        try:
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(handle, line.encode())  # at once: others that watch the run write there, too
            finally:
                os.close(handle)
        except OSError as error:
            raise RunError(f"{path}: not written ({error.strerror})") from None


def watch(
    run: WatchedRun, measure: Callable[[SavedWeights], TaskScores | None], say: Callable[[str], None]
) -> Iterator[TaskScores]:
    """Measure the weights of a run and yield the figures, for new ones again, until the run and its last are done.

    `measure` returns None where the weights were replaced while it read them. `say` gets the state of the run. Raises
    MissingInput where the run has ended without weights.
    """
    last: int | None = None
    waits = False
    while True:
        running = run.is_running  # first: what a run saves before its end is then on the disk
        saved = run.saved(running)
        if saved is not None and saved.step != last:
            if (scores := measure(saved)) is not None:
                last = saved.step
                run.note(scores)
                yield scores
        elif running:
            if not waits:
                say(f"{run.folder} is training: waiting for its {'next' if last is not None else 'first'} weights")
            waits = True
            time.sleep(PAUSE)
        elif last is None:
            raise MissingInput(f"{run.describe_end()}: it has no weights to measure, or no state that names their step")
        else:
            say(run.describe_end())
            return
