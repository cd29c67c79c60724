"""Scores of answers: VQA's, POPE's, CIDEr, and those of sacrebleu, against values that were computed otherwise."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import sacrebleu

from minimind_v.core.evaluate.ask import Reply
from minimind_v.core.evaluate.cider import cider, words_of
from minimind_v.core.evaluate.normalise import is_exact, normalise, soft_score
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.statistics import estimate
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.evaluate.tasks.task import statistics_of
from minimind_v.core.evaluate.tasks.yesno import yes_or_no


def rows_of(metric, verdicts):
    """The statistics of a metric [n, k] of these verdicts."""
    return statistics_of(metric, [verdict.statistics for verdict in verdicts])


def ask(*truths, name="1", choices=(), correct=None):
    return Question(name, 0, "rows:1", (("user", "What?"),), (), truths, choices, correct)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("two dogs", "2 dogs"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),
        ("3.5 m", "3.5 m"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("what?", "what"),
        ("well", "well"),
        ("红色。", "红色"),
        ("是 ，对", "是,对"),
        ("A\nB", "b"),
    ],
)
def test_answers_are_normalised_as_vqa_does(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(("agree", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_soft_score_over_ten_annotators_is_the_published_one(agree, expected):
    truths = ["yes"] * agree + [f"other {n}" for n in range(10 - agree)]
    assert soft_score("Yes.", truths) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [("", "A", 0.0), ("A.", "A", 1.0), ("the", "A", 0.0), ("B", "A", 0.0), ("", "?", 0.0), ("?", "?", 1.0)],
)
def test_an_empty_answer_is_not_one_that_is_an_article_or_a_mark(answer, truth, score):
    assert (soft_score(answer, [truth]), is_exact(answer, [truth])) == (score, score == 1)


def test_a_single_annotator_is_right_or_wrong():
    assert (soft_score("the cat", ["cat"]), soft_score("dog", ["cat"])) == (1.0, 0.0)
    assert is_exact("Cat", ["cat", "dog", "cat"])
    assert not is_exact("dog", ["cat", "dog", "cat"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes, there is.", True), ("no", False), ("There is not a cat", False), ("No. Yes.", False), ("maybe", None),
        ("", None), ("是的", True), ("没有", False), ("不是", False), ("Yesterday", None), ("there isn't one", False),
        ("沒有", False), ("無", False), ("I cannot see one", False), ("It isn’t", False), ("ＮＯ", False),
        (". no", False), ("Well, no", False), ("Yes, not there", False), ("Yes, there. Not", True),
        ("是的，不远", True),
    ],
)  # fmt: skip
def test_yes_and_no_are_read(text, expected):
    assert yes_or_no(text) is expected


def test_popes_five_figures_are_those_of_the_confusion():
    task = TASKS["yesno"]("yesno", {})
    said = ["yes"] * 5 + ["no"] * 4 + ["perhaps"]
    true = ["yes", "yes", "yes", "no", "no", "yes", "no", "no", "no", "yes"]
    verdicts = [task.judge(ask(truth), [Reply(text)]) for text, truth in zip(said, true, strict=True)]
    values = {
        metric.name: estimate(metric, rows_of(metric, verdicts), [str(n) for n in range(10)]).value
        for metric in task.metrics
    }
    assert values == pytest.approx(
        {"accuracy": 0.6, "precision": 3 / 5, "recall": 3 / 5, "f1": 2 * 3 / (5 + 5), "yes_share": 0.5}
    )


def test_the_likeliest_choice_is_found_per_token_whole_and_by_letter():
    task = TASKS["choice"]("choice", {})
    question = ask("long", choices=("short", "long one"), correct=1)
    replies = [Reply("", (-3.0, -4.0), (1, 4)), Reply("", (-2.0, -1.0), (1, 1)), Reply("", (-2.0, -1.0), (1, 1))]
    verdict = task.judge(question, replies)
    right = {name: sums[0] for name, sums in verdict.statistics.items()}
    assert right == {"accuracy": 1, "accuracy_sum": 0, "accuracy_letter": 1, "accuracy_circular": 0}
    assert verdict.answer == "long one"
    both = [replies[0], replies[1], Reply("", (-1.0, -2.0), (1, 1))]  # turned round, it is the first
    assert task.judge(question, both).statistics["accuracy_circular"][0] == 1
    prompts = [ask_.messages[-1][1] for ask_ in task.asks(question)]
    assert prompts[1].split("\n")[1:3] == ["A. short", "B. long one"]
    assert prompts[2].split("\n")[1:3] == ["A. long one", "B. short"]


CAPTIONS = ["a red star on the table", "two circles", "一个红色的圆", "a cat"]
REFERENCES = [["a red star", "the red star lies on a table"], ["two blue circles", "circles"], ["红色圆形"], ["a cat"]]


def test_bleu_and_chrf_of_all_captions_are_sacrebleus():
    task = TASKS["caption"]("caption", {})
    questions = [ask(*truths, name=str(n)) for n, truths in enumerate(REFERENCES)]
    verdicts = [task.judge(question, [Reply(text)]) for question, text in zip(questions, CAPTIONS, strict=True)]
    verdicts = task.complete(questions, verdicts)
    columns = [[truths[n] if n < len(truths) else None for truths in REFERENCES] for n in range(2)]
    expected = {
        "bleu": sacrebleu.corpus_bleu(CAPTIONS, columns, tokenize="zh").score,
        "chrf": sacrebleu.corpus_chrf(CAPTIONS, columns).score,
        "cider": np.mean(cider(CAPTIONS, REFERENCES)),
    }
    clusters = list("abcd")
    results = {metric.name: estimate(metric, rows_of(metric, verdicts), clusters) for metric in task.metrics}
    assert {name: result.value for name, result in results.items()} == pytest.approx(expected)
    assert all(result.low < result.value < result.high for result in results.values())
    assert verdicts[0].score == pytest.approx(sacrebleu.sentence_chrf(CAPTIONS[0], REFERENCES[0]).score)


def plain_cider(captions, references):
    """The paper's formula with CIDEr-D's clipping and penalty, written with vectors over all n-grams."""

    def grams(text, size):
        words = words_of(text)
        return Counter(" ".join(words[n : n + size]) for n in range(len(words) - size + 1))

    scores = []
    for caption, texts in zip(captions, references, strict=True):
        total = 0.0
        for size in range(1, 5):
            names = sorted({gram for all_texts in references for text in all_texts for gram in grams(text, size)})
            images = [{gram for text in all_texts for gram in grams(text, size)} for all_texts in references]
            names += [gram for gram in grams(caption, size) if gram not in names]
            rare = np.array([math.log(len(references) / max(1, sum(gram in own for own in images))) for gram in names])
            own = np.array([grams(caption, size)[gram] for gram in names]) * rare
            for text in texts:
                other = np.array([grams(text, size)[gram] for gram in names]) * rare
                norm = np.linalg.norm(own) * np.linalg.norm(other)
                gap = max(len(words_of(caption)) - 1, 0) - max(len(words_of(text)) - 1, 0)
                if norm:
                    total += np.minimum(own, other) @ other / norm * math.exp(-(gap**2) / 72) / len(texts)
        scores.append(10 * total / 4)
    return scores


def test_cider_is_the_papers_formula():
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(plain_cider(CAPTIONS, REFERENCES))
    same = ["a red star on the table", "two blue circles and a cross"]
    assert cider(same, [[text] for text in same]) == pytest.approx([10, 10]), "a caption equal to its reference"
    assert cider(["x", "y"], [["a b"], ["c d"]]) == [0, 0]


def test_words_of_a_caption_have_no_marks_and_chinese_is_cut_into_characters():
    assert words_of("A red-hot star, isn't it? 红色圆") == ["a", "red-hot", "star", "isn't", "it", "红", "色", "圆"]


def test_the_loss_is_by_token_and_by_language():
    task = TASKS["loss"]("loss", {})
    replies = [Reply("", (-6.0,), (2,)), Reply("", (-4.0,), (8,))]
    verdicts = [task.judge(ask(truth), [reply]) for truth, reply in zip(["红色", "red"], replies, strict=True)]
    results = {m.name: estimate(m, rows_of(m, verdicts), ["a", "b"]) for m in task.metrics}
    values = {name: result.value for name, result in results.items()}
    assert values == pytest.approx({
        "loss": 1.0, "perplexity": math.e, "loss_zh": 3.0, "perplexity_zh": math.exp(3), "loss_en": 0.5,
        "perplexity_en": math.exp(0.5),
    })  # fmt: skip
    assert results["perplexity"].low == pytest.approx(math.exp(results["loss"].low))
