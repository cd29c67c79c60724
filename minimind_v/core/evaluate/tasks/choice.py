"""Questions with choices: by the likelihood of each, by its letter, and by the letter in every order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import MappingProxyType

import numpy as np

from minimind_v.core.errors import RowError
from minimind_v.core.evaluate.ask import Ask, Reply
from minimind_v.core.evaluate.questions import LETTERS, OPTIONS, Question
from minimind_v.core.evaluate.statistics import Metric
from minimind_v.core.evaluate.tasks.task import Task, Verdict, share
from minimind_v.core.rows.row import IMAGE_MARK

ASK_LETTER = "Answer with the letter of the right choice."


class Choice(Task):
    """The likeliest choice.

    `accuracy`: by log-probability per token; `accuracy_sum`: by that of the whole choice; `accuracy_letter`: by the
    letter before it; `accuracy_circular`: right by letter in each order of the choices, turned round by one
    (MMBench's circular evaluation).
    """

    metrics = tuple(map(Metric, ("accuracy", "accuracy_sum", "accuracy_letter", "accuracy_circular")))
    options = MappingProxyType({"letters": True})  # whether the letters are asked as well

    def check(self, question: Question) -> None:
        if len(question.choices) < 2:
            raise question.needs("choices", "`choices`, `options`, or columns `A`, `B` …")
        if len(question.choices) > len(LETTERS):
            raise RowError(f"{len(question.choices)} choices; a question has at most {len(LETTERS)}", "too long")
        if question.correct is None:
            several = len(question.truths) > 1
            raise question.needs(
                "single right choice" if several else "right choice",
                "`answer`: its letter, its text or its number from 0",
            )

    def asks(self, question: Question) -> list[Ask]:
        plain = self.messages(question, _without_choices(question))
        asks = [Ask(plain, "likelihood", question.choices)]
        if self.settings["letters"]:
            letters = tuple(LETTERS[: len(question.choices)])
            asks += [
                Ask(self.messages(question, _lettered(question, turn)), "first", letters)
                for turn in range(len(question.choices))
            ]
        return asks

    def judge(self, question: Question, replies: Sequence[Reply]) -> Verdict:
        likelihood, *turns = replies
        sums = np.array(likelihood.logprobs)
        per_token = int(np.argmax(sums / np.array(likelihood.tokens)))
        statistics = {
            "accuracy": share(per_token == question.correct),
            "accuracy_sum": share(int(np.argmax(sums)) == question.correct),
        }
        count = len(question.choices)
        letters = [(int(np.argmax(reply.logprobs)) + turn) % count for turn, reply in enumerate(turns)]
        if letters:
            statistics["accuracy_letter"] = share(letters[0] == question.correct)
            statistics["accuracy_circular"] = share(all(letter == question.correct for letter in letters))
        assert question.correct is not None
        truth = question.choices[question.correct]
        among = np.exp(sums - np.logaddexp.reduce(sums))  # probabilities, if the answer is one of the choices
        answer, score = question.choices[per_token], float(per_token == question.correct)
        return Verdict(answer, truth, score, statistics, float(among[per_token]))


def _without_choices(question: Question) -> str:
    """The question as its row has it, without choices that are written in it. Choices that are letters need these."""
    text = question.messages[-1][1]
    return text if "".join(question.choices) in LETTERS else OPTIONS.split(text, maxsplit=1)[0]


def _lettered(question: Question, turn: int) -> str:
    """The question with its choices by letter, turned round `turn` times."""
    turned = [*question.choices[turn:], *question.choices[:turn]]
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, turned, strict=False)]
    text = _without_choices(question)
    mark = re.match(rf"(?:{IMAGE_MARK}\n?)*", text)
    assert mark is not None
    return "\n".join([text, *lines, ASK_LETTER])
