"""Exact match of short answers: the share that the model predicts exactly."""

from __future__ import annotations

from typing import Any

from minimind_v.core.evaluate.forward import Answer
from minimind_v.core.evaluate.tasks.task import Task

SHORT = 12  # tokens, the end token included: longer answers are not judged


class Exact(Task):
    """Every token of a short answer, and its end, must be the likeliest."""

    name = "accuracy"

    def score(self, answer: Answer) -> float | None:
        if not answer.ended or len(answer.labels) > SHORT:
            return None
        return bool(answer.correct.all())

    def metrics(self) -> dict[str, Any]:
        scores = [score for row in self.scores.values() for score in row if score is not None]
        return {"short_answers": len(scores), "accuracy": sum(scores) / len(scores) if scores else None}
