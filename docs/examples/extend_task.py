"""An evaluation task: `mmv eval --task yesno` measures the answers to questions that are answered by yes or no."""

from minimind_v.core.evaluate.forward import Answer
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.evaluate.tasks.task import Task
from minimind_v.core.rows.row import Row


class YesNo(Task):
    """The share of right answers; `mmv eval --json` has it under this name, beside the number of answers."""

    name = "yesno_accuracy"

    def conversation(self, row: Row) -> list[dict[str, str]] | None:
        """Which rows, and what the model reads of them: the first turn, where its answer is yes or no."""
        system = [message for message in row.conversations[:1] if message["role"] == "system"]
        question, *answers = row.conversations[len(system) :]
        if not answers or answers[0]["content"].strip(" .").lower() not in ("yes", "no"):
            return None
        return [*system, question, answers[0]]

    def score(self, answer: Answer) -> float | None:
        """How an answer scores: 1 where the model would give each of its tokens."""
        return float(answer.correct.all())


TASKS["yesno"] = YesNo
