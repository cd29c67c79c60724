"""The metrics of a run, the listener that receives them as events, and the JSON lines that keep them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind_v.core.errors import DataError, MissingInput, RunError
from minimind_v.core.files import write_text
from minimind_v.core.monitor.records import INTERVAL, LONGEST, LOSS, read_records

if TYPE_CHECKING:
    from minimind_v.core.data.batch import Batch


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step. Counts and seconds add up from the start of the run."""

    step: int  # from 1
    steps: int  # of the whole run
    epoch: float  # epochs done after this step
    loss: float  # nats per supervised token of this step, with the auxiliary loss
    token_accuracy: float  # share of this step's supervised tokens that were the likeliest
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


@dataclass(frozen=True)
class Validation:
    """Loss and token accuracy on held-out rows."""

    step: int
    loss: float  # nats per supervised token, computed as in training, without the auxiliary loss
    token_accuracy: float  # share of the supervised tokens that were the likeliest
    swapped_loss: float | None  # with the images of other rows; None where the rows have no images
    rows: int
    best: bool = False  # its weights are the best of the run until then


@dataclass(frozen=True)
class TaskScores:
    """The figures of a task for the weights of a step, as `report.json` of an evaluation has them."""

    step: int
    task: str
    data: str
    rows: int  # questions
    pictures: int
    metric: str  # the task's main one, with the images:
    value: float | None
    ci_low: float | None
    ci_high: float | None
    blank: float | None  # the same with blank images
    visual_gain: dict[str, dict[str, float | None]]  # value and interval by what replaces the images
    metrics: list[dict[str, Any]]
    predictions: str  # the file
    seconds: float
    best: bool = False  # its weights are the best of the run until then

    @property
    def gain(self) -> dict[str, float | None]:
        """What the images add to the metric, with its interval; no values where no question has an image."""
        return self.visual_gain["blank"]

    @property
    def figures(self) -> dict[str, float]:
        """Value, value with blank images and gain by their names, those that are known."""
        figures = {self.metric: self.value, f"{self.metric}_blank": self.blank, "visual_gain": self.gain["value"]}
        return {name: value for name, value in figures.items() if value is not None}


def describe_scores(scores: TaskScores) -> str:
    """The figures in words: `vqa 0.41 [0.35, 0.47], blank 0.29, gain 0.12 [0.05, 0.19]`."""
    blank = "" if scores.blank is None else f", blank {scores.blank:.3g}"
    main, gain = interval(vars(scores)), interval(scores.gain)
    return f"{scores.metric} {main or 'unknown'}{blank}" + (f", gain {gain}" if gain else "")


def interval(figure: Mapping[str, Any]) -> str:
    """A value with its interval: `0.41 [0.35, 0.47]`; empty without a value."""
    value, *ends = (None if figure[key] is None else f"{figure[key]:.3g}" for key in INTERVAL)
    return "" if value is None else value if None in ends else f"{value} [{', '.join(map(str, ends))}]"


@dataclass(frozen=True)
class Best:
    """The weights that are kept as the best of a run: their step, and the value that decided."""

    step: int
    by: str  # what was measured
    value: float
    lower_is_better: bool = True

    def beats(self, other: Best | None) -> bool:
        """Whether these are better; weights that were chosen by anything else do not count."""
        if other is None or other.by != self.by:
            return True
        return self.value < other.value if self.lower_is_better else self.value > other.value

    def __str__(self) -> str:
        return f"of step {self.step} ({self.by}: {self.value:.4f})"


@dataclass(frozen=True)
class Recalled:
    """Loss and token accuracy on some rows of a file, measured without training on them."""

    data: str
    rows: int
    loss: float  # nats per supervised token
    token_accuracy: float  # share of the supervised tokens that were the likeliest


class Listener:
    """Receives the events of a run and ignores them; a subclass shows or keeps those that it needs."""

    def message(self, text: str) -> None:
        """A message about the run."""

    def warning(self, text: str) -> None:
        """A warning, with advice."""

    def lost(self, text: str) -> None:
        """A warning that something which the run was asked for was not saved or not measured."""
        self.warning(text)

    def batches(self, batches: Sequence[Batch]) -> None:
        """The micro-batches of this process that the next step trains on."""

    def step(self, metrics: StepMetrics, logged: bool) -> None:
        """A step is done; `logged` is true for one of every log_every."""

    def validated(self, result: Validation) -> None:
        """Held-out rows were measured."""

    def evaluated(self, scores: TaskScores) -> None:
        """The weights were measured by a task."""

    def saved(self, step: int) -> None:
        """Weights and state of this step are on the disk."""

    def close(self) -> None:
        """The run has ended."""


class JsonLines:
    """A file of records with a step, a line of JSON each, flushed. A resumed run keeps the lines up to its state."""

    def __init__(self, path: Path, after: int = 0) -> None:
        kept = [line for line, record in read_records(path) if record["step"] <= after] if after else []
        if path.is_file() and not path.is_symlink():
            write_text(path, "".join(kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+", encoding="utf-8")

    def write(self, record: dict[str, Any] | None = None) -> bool:
        """Write a line. Returns whether the file was removed, and was written again with all its lines.

        Without a record, only a removed file is written. Raises RunError if the disk is full; a later call writes the
        line too.
        """
        try:
            again = self._is_gone()
            if record is not None:
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
            if again:
                self._make_again()
        except OSError as error:
            raise RunError(f"{self.path}: not written ({error.strerror})") from None
        return again

    def _is_gone(self) -> bool:
        """Whether no file, or another file, has the name."""
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return True

    def _make_again(self) -> None:
        """The open file still has all lines, even after its removal."""
        self._file.seek(0)
        write_text(self.path, self._file.read())
        self._file.close()
        self._file = self.path.open("a+", encoding="utf-8")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # reported when it was written
            self._file.close()


def read_lines(path: Path, damaged: Callable[[str], object] = lambda _: None) -> Iterator[dict[str, Any]]:
    """The records of a file of JsonLines; none without a file. `damaged` gets a message about each damaged line."""
    return (record for _, record in read_records(path, damaged))


def read_metrics(
    path: Path, damaged: Callable[[str], object] = lambda _: None, needed: tuple[str, ...] = LOSS
) -> list[dict[str, Any]]:
    """The logged steps of a run; `damaged` gets a message about each line without a key of `needed`.

    Raises MissingInput without a step, DataError where every line is damaged.
    """
    troubles: list[str] = []

    def note(trouble: str) -> None:
        troubles.append(trouble)
        damaged(trouble)

    logged = [record for _, record in read_records(path, note, needed) if "loss" in record]
    if not logged and troubles:
        raise DataError(f"{troubles[0]} — not the metrics of a run, or damaged")
    if not logged and path.is_file() and b"\n" in path.read_bytes()[:LONGEST]:
        raise DataError(f"{path}: not the metrics of a run")
    if not logged:
        raise MissingInput(f"{path}: the run has logged nothing yet")
    return logged
