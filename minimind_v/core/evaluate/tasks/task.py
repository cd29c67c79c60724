"""The base of all evaluation tasks: what is asked about a question, and how the replies are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from minimind_v.core.errors import UsageError, nearest
from minimind_v.core.evaluate.ask import Ask, Reply
from minimind_v.core.evaluate.normalise import normalise
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.statistics import Metric


@dataclass(frozen=True)
class Verdict:
    """The judgement about the replies to one question.

    `statistics` holds by metric the sums that this question adds, its weight last; a metric without an entry gets
    nothing from it.
    """

    answer: str
    truth: str
    score: float
    statistics: Mapping[str, Sequence[float]] = field(default_factory=dict)
    confidence: float | None = None  # how probable the answer was to the model, where its score says how right it is


class Task:
    """A task. A subclass names its metrics and overrides `judge`, and where it needs to `check` and `asks`.

    `settings` are the keys of a user's YAML file.
    """

    metrics: tuple[Metric, ...] = (Metric("accuracy"),)
    gain = "accuracy"  # the metric by which images help
    lower_is_better = False  # whether that is a loss
    most_tokens = 16  # of an answer
    instruction = ""  # text behind every question
    options: Mapping[str, Any] = MappingProxyType({})  # further keys of a YAML file, with their defaults
    answers: Literal["short", "long", "none"] = "short"  # short ones are counted

    def __init__(self, name: str, settings: Mapping[str, Any], until: Sequence[str] = ()) -> None:
        """An answer ends before the first text of `until`.

        Raises UsageError for unknown settings, and for those of another type.
        """
        usual = {"most_tokens": self.most_tokens, "instruction": self.instruction, **self.options}
        choices = ["task", "fields", *usual]
        problems = [
            f"no setting {key!r}{nearest(key, choices)} — there are {', '.join(choices)}"
            if key not in usual
            else f"{key} must be of the type {type(usual[key]).__name__}, not {value!r}"
            for key, value in settings.items()
            if key not in usual or type(value) is not type(usual[key])
        ]
        if problems:
            raise UsageError("; ".join(problems))
        self.name = name
        self.settings = usual | dict(settings) | ({"until": list(until)} if until else {})
        self.most_tokens, self.instruction = self.settings["most_tokens"], self.settings["instruction"]
        self.until = tuple(until)

    def select(self, questions: Sequence[Question]) -> list[Question]:
        """The questions of this task among those of all rows; a caption's references may be in several rows."""
        return list(questions)

    def check(self, question: Question) -> None:
        """Raises RowError where a question lacks what the task needs."""
        if not question.truths:
            raise question.needs("true answer", "`answer` or `answers`")

    def asks(self, question: Question) -> list[Ask]:
        """What the model is asked, images left out: the answer to the question."""
        return [Ask(self.messages(question), most_tokens=self.most_tokens)]

    def judge(self, question: Question, replies: Sequence[Reply]) -> Verdict:
        """Judge the replies to `asks`."""
        raise NotImplementedError

    @staticmethod
    def label(answer: str) -> str:
        """The form in which equal answers are counted as one."""
        return normalise(answer)

    def complete(self, questions: Sequence[Question], verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts, with what needs those of all questions."""
        return list(verdicts)

    def answer(self, replies: Sequence[Reply]) -> str:
        """The answer of the first reply."""
        text = replies[0].text
        return text[: min((at for end in self.until if (at := text.find(end)) >= 0), default=len(text))].strip()

    def messages(self, question: Question, text: str | None = None) -> tuple[tuple[str, str], ...]:
        """The prompt: earlier turns, and the question with the instruction behind it."""
        *before, (role, content) = question.messages
        content = content if text is None else text
        return (*before, (role, f"{content}\n{self.instruction}" if self.instruction else content))


def statistics_of(metric: Metric, statistics: Sequence[Mapping[str, Sequence[float]]]) -> np.ndarray:
    """The rows [n, k] of a metric, zeros where a question adds nothing to it."""
    width = max((len(own[metric.name]) for own in statistics if metric.name in own), default=2)
    return np.array([own.get(metric.name, [0.0] * width) for own in statistics], float).reshape(-1, width)


def share(value: float) -> list[float]:
    """The statistics of a question with this score, of weight 1."""
    return [float(value), 1.0]
