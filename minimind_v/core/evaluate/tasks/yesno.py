"""Questions that are answered by yes or no: POPE's five figures (Li et al., 2023)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from minimind_v.core.evaluate.ask import Reply
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.statistics import Metric
from minimind_v.core.evaluate.tasks.task import Task, Verdict, share

NO = re.compile(r"\b(?:no|not|nope|false|n|cannot)\b|n't\b|没有|沒有|不|否|无|無|非|错|錯")
YES = re.compile(r"\b(?:yes|yeah|yep|true|y)\b|有|是|对|對|会|會|能|可以")
ENDS = re.compile(r"[.。!！\n，]")  # of a sentence, in Chinese of its first clause
BEFORE = re.compile(r"^[\W_]+")


def yes_or_no(text: str) -> bool | None:
    """Whether a text says yes; None where it says neither.

    As POPE reads answers, its first sentence decides, and a denial anywhere in it is a no. POPE takes any other
    sentence for a yes.
    """
    first = unicodedata.normalize("NFKC", ENDS.split(BEFORE.sub("", text), maxsplit=1)[0]).lower().replace("’", "'")
    if NO.search(first):
        return False
    return True if YES.search(first) else None


def _dice(jaccard: Any) -> Any:
    """F1 from the share of questions with both a true and an answered yes among those with either.

    That share is one of equal rows, as F1 itself, which counts some twice, is not.
    """
    return 2 * jaccard / (1 + jaccard)


class YesNo(Task):
    """The generated answer as yes or no. What is neither is wrong, and not a yes.

    Precision, recall and F1 are those of yes.
    """

    metrics = (*map(Metric, ("accuracy", "precision", "recall")), Metric("f1", link=_dice), Metric("yes_share"))

    def check(self, question: Question) -> None:
        super().check(question)
        if yes_or_no(question.truths[0]) is None:
            raise question.needs("answer of yes or no", f"the answer is {question.truths[0]!r:.40}")

    def judge(self, question: Question, replies: Sequence[Reply]) -> Verdict:
        text = self.answer(replies)
        answer, truth = yes_or_no(text), yes_or_no(question.truths[0])
        right, yes = float(answer is truth), float(answer is True)
        both = float(answer is True and truth is True)
        statistics = {
            "accuracy": share(right),
            "precision": [both, yes],
            "recall": [both, float(truth is True)],
            "f1": [both, float(answer is True or truth is True)],
            "yes_share": share(yes),
        }
        return Verdict(text, "yes" if truth else "no", right, statistics, replies[0].probability)

    @staticmethod
    def label(answer: str) -> str:
        return {True: "yes", False: "no", None: "neither"}[yes_or_no(answer)]
