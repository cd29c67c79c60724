"""The loss on true answers: nats per token, the perplexity, and both by language."""

from __future__ import annotations

from collections.abc import Sequence

from minimind_v.core.evaluate.ask import Ask, Reply, perplexity
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.statistics import Metric
from minimind_v.core.evaluate.tasks.task import Task, Verdict

LANGUAGES = ("", "_zh", "_en")


class Loss(Task):
    """The mean loss over the supervised tokens of all true answers. A verdict's score is its own mean."""

    metrics = tuple(
        metric
        for language in LANGUAGES
        for metric in (
            Metric(f"loss{language}", is_share=False),
            Metric(f"perplexity{language}", is_share=False, link=perplexity),
        )
    )
    gain = "loss"
    lower_is_better = True
    answers = "none"

    def asks(self, question: Question) -> list[Ask]:
        return [Ask(self.messages(question), "supervised", question.truths[:1])]

    def judge(self, question: Question, replies: Sequence[Reply]) -> Verdict:
        [logprob], [tokens] = replies[0].logprobs, replies[0].tokens
        sums = [-logprob, float(tokens)]
        own = LANGUAGES[1 if question.chinese else 2]
        names = (f"{name}{language}" for language in ("", own) for name in ("loss", "perplexity"))
        return Verdict("", question.truths[0], -logprob / tokens, dict.fromkeys(names, sums))
