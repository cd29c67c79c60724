"""An evaluation task: `mmv eval --task length` measures whether an answer has as many words as the true one."""

from collections.abc import Sequence

from minimind_v.core.errors import RowError
from minimind_v.core.evaluate.ask import Reply
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.statistics import Metric
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.evaluate.tasks.task import Task, Verdict, share


class Length(Task):
    """The share of answers of the right length; `mmv eval --json` has it under the name of the metric."""

    metrics = (Metric("right_length"),)
    gain = "right_length"

    def check(self, question: Question) -> None:
        """Which questions: those whose answer is one to three words."""
        super().check(question)
        if not 1 <= len(question.truths[0].split()) <= 3:
            raise RowError("not a short answer", "not of this task")

    def judge(self, question: Question, replies: Sequence[Reply]) -> Verdict:
        """How a reply scores: 1 where its number of words is the true one."""
        answer, truth = replies[0].text, question.truths[0]
        score = float(len(answer.split()) == len(truth.split()))
        return Verdict(answer, truth, score, {"right_length": share(score)})


TASKS["length"] = Length
