"""Short answers: exact ones, and VQA's score over annotators."""

from __future__ import annotations

from collections.abc import Sequence

from minimind_v.core.evaluate.ask import Reply
from minimind_v.core.evaluate.normalise import is_exact, soft_score, usual_truth
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.statistics import Metric
from minimind_v.core.evaluate.tasks.task import Task, Verdict, share


class Vqa(Task):
    """The generated answer, compared with those of one or several annotators after VQA's normalisation."""

    metrics = (Metric("vqa"), Metric("exact"))
    gain = "vqa"

    def judge(self, question: Question, replies: Sequence[Reply]) -> Verdict:
        answer = self.answer(replies)
        soft = soft_score(answer, question.truths)
        statistics = {"vqa": share(soft), "exact": share(is_exact(answer, question.truths))}
        return Verdict(answer, usual_truth(question.truths), soft, statistics, replies[0].probability)
