"""Captions: chrF and BLEU by sacrebleu, CIDEr-D; Chinese by characters, with several references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from minimind_v.core.evaluate.ask import Reply
from minimind_v.core.evaluate.cider import cider
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.statistics import Metric
from minimind_v.core.evaluate.tasks.task import Task, Verdict, share
from minimind_v.core.rows.forms import DESCRIBE, DESCRIBE_CHINESE
from minimind_v.core.rows.row import NUMBERED

# sacrebleu sums the statistics of sentences for a corpus, and so does `Metric`; its own names for the two steps are
# private, but the same in all its metrics and releases. `zh` leaves English words as they are.
BLEU_SCORER, CHRF_SCORER = BLEU(tokenize="zh"), CHRF()


def _corpus(scorer: Any) -> Any:
    """A corpus metric as a function of sums; their last is the number of captions."""

    def value(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1])
        values = [scorer._aggregate_and_compute([row[:-1].round().astype(int).tolist()]).score for row in flat]
        return np.array(values).reshape(sums.shape[:-1])

    return value


class Caption(Task):
    """A generated caption and all references of its image: BLEU and chrF in 0 … 100, CIDEr-D in 0 … 10.

    The score of one caption is its chrF. All rows of an image that ask for a description are one question.
    """

    metrics = (
        Metric("chrf", _corpus(CHRF_SCORER), is_share=False, bounds=(0, 100)),
        Metric("bleu", _corpus(BLEU_SCORER), is_share=False, bounds=(0, 100)),
        Metric("cider", is_share=False, bounds=(0, 10)),
    )
    gain = "chrf"
    most_tokens = 64
    answers = "long"

    def select(self, questions: Sequence[Question]) -> list[Question]:
        together: dict[tuple[Any, ...], Question] = {}
        for question in questions:
            describes = question.text in (DESCRIBE, DESCRIBE_CHINESE)
            named = bool(question.images) and not NUMBERED.fullmatch(question.images[0])
            key: tuple[Any, ...] = (question.images, question.text) if describes and named else (question.id,)
            first = together.setdefault(key, question)
            if first is not question:
                together[key] = replace(first, truths=(*first.truths, *question.truths))
        return list(together.values())

    def judge(self, question: Question, replies: Sequence[Reply]) -> Verdict:
        answer, references = self.answer(replies), [[truth] for truth in question.truths]
        statistics = {
            name: [*map(float, scorer._extract_corpus_statistics([answer], references)[0]), 1.0]
            for name, scorer in (("chrf", CHRF_SCORER), ("bleu", BLEU_SCORER))
        }
        score = CHRF_SCORER.sentence_score(answer, list(question.truths)).score
        return Verdict(answer, question.truths[0], score, statistics)

    def complete(self, questions: Sequence[Question], verdicts: Sequence[Verdict]) -> list[Verdict]:
        scores = cider([verdict.answer for verdict in verdicts], [question.truths for question in questions])
        return [
            replace(verdict, statistics={**verdict.statistics, "cider": share(score)})
            for verdict, score in zip(verdicts, scores, strict=True)
        ]
