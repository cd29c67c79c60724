"""The base of all evaluation tasks: it chooses rows, scores answers, and reports the mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from minimind_v.core.data.prompt import PromptEncoder, check_conversations
from minimind_v.core.errors import RowError
from minimind_v.core.evaluate.forward import Answer, BatchLosses
from minimind_v.core.rows.row import Row, RowStore
from minimind_v.core.rows.subset import SampledRows


class Task:
    """A task. A subclass overrides `score`, and where it needs to `conversation`, `add` and `metrics`.

    One forward pass serves all tasks that read a row in the same way: the model predicts every token of the true
    answers after the true tokens before it, so a greedy answer equals the truth exactly where all are predicted right.
    """

    name = ""

    def __init__(self, end_id: int) -> None:
        self.end_id = end_id
        self.scores: dict[str, list[float | None]] = {}  # place of the row → one score per answer

    def conversation(self, row: Row) -> list[dict[str, str]] | None:
        """The messages that the model reads, true answers included; None for a row that is not of this task."""
        messages: list[dict[str, str]] | None = row.conversations
        return messages

    def score(self, answer: Answer) -> float | None:
        """The score of one answer; None where the task does not judge it."""
        raise NotImplementedError

    def add(self, losses: BatchLosses) -> None:
        """Score the answers of a batch."""
        for row in losses.batch.locations:
            self.scores[row] = []
        for answer in losses.answers(self.end_id):
            self.scores[losses.batch.locations[answer.row]].append(self.score(answer))

    def metrics(self) -> dict[str, Any]:
        """The results by the names that `mmv eval --json` gives them."""
        scores = [score for row in self.scores.values() for score in row if score is not None]
        return {"answers": len(scores), self.name: sum(scores) / len(scores) if scores else None}


class TaskRows(SampledRows):
    """The rows of a store that a task takes, with the conversations that it makes of them."""

    def __init__(self, rows: RowStore, task: Task, encoder: PromptEncoder) -> None:
        self._task, self._encoder = task, encoder
        super().__init__(rows, np.array([index for index in range(len(rows)) if self._takes(rows, index)], np.int64))

    def _takes(self, rows: RowStore, index: int) -> bool:
        """Whether the task takes a row; one that is broken stays, so that it is counted."""
        try:
            row = rows.row(index)
            check_conversations(row.conversations, self._encoder.layout)
        except RowError:
            return True
        return self._task.conversation(row) is not None

    def row(self, index: int) -> Row:
        row = super().row(index)
        check_conversations(row.conversations, self._encoder.layout)
        return replace(row, conversations=self._task.conversation(row))
