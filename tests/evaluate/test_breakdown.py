"""Figures beside the metrics, from predictions: each against a count of its own, and no more than the data give."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from minimind_v.core.evaluate.answering import Answering, Features
from minimind_v.core.evaluate.ask import Ask, Reply
from minimind_v.core.evaluate.breakdown import (
    FEWEST,
    LABELS,
    answer_length,
    calibration,
    confusion,
    languages,
    most_frequent_answer,
)
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.sheets import CARDS, read_thumbnails, sheets_of, thumbnail, write_thumbnails
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.formats.load import load
from tests.cli.harness import ASSETS, EYE, sighted


def prediction(number, truth="cat", answer="cat", score=None, confidence=None, task="vqa", variant="seen", **more):
    score = float(answer == truth) if score is None else score
    return {
        "id": f"q{number:05}", "picture": f"p{number // 2}", "question": "Which?", "answer": answer, "truth": truth,
        "score": score, "variant": variant, "confidence": confidence, "kind": "", "task": task,
        "statistics": {"vqa": [score, 1.0], "accuracy": [score, 1.0], "loss": [score, 1.0]}, **more,
    }  # fmt: skip


# --- confusion --------------------------------------------------------------------------------------------------------


def test_the_confusion_counts_answers_by_truth_and_others_together():
    rng = random.Random(0)
    truths = [f"t{min(int(rng.expovariate(0.2)), 20)}" for _ in range(400)]
    lines = [prediction(n, truth, rng.choice([truth, "t0", "a dog", ""])) for n, truth in enumerate(truths)]
    report = confusion(lines)
    assert report["labels"] == [truth for truth, _ in sorted(Counter(truths).items(), key=lambda c: (-c[1], c[0]))][:10]
    counted = Counter(
        tuple(
            text if text in report["labels"] else "other" for text in (line["truth"], line["answer"].removeprefix("a "))
        )
        for line in lines
    )
    names = [*report["labels"], "other"]
    assert len(report["labels"]) == LABELS
    assert report["counts"] == [[counted[truth, answer] for answer in names] for truth in names]
    assert sum(map(sum, report["counts"])) == 400


def test_the_confusion_reads_yes_and_no_as_the_task_does():
    answers = ["Yes, there is.", "no", "没有", "maybe"]
    lines = [prediction(n, truth, answers[n // 2], task="yesno") for n, truth in enumerate(["yes", "no"] * 4)]
    assert confusion(lines) == {"labels": ["no", "yes"], "counts": [[2, 1, 1], [2, 1, 1], [0, 0, 0]]}


def test_answers_are_counted_as_the_task_compares_them_and_shown_as_they_are_written():
    truths = ["three", "three", "3", "two", "two", "a big dog", "a big dog"]
    lines = [prediction(n, truth, "3." if n < 4 else "two") for n, truth in enumerate(truths)]
    assert confusion(lines)["labels"] == ["three", "two", "a big dog"]
    assert confusion(lines)["counts"][0] == [3, 0, 0, 0]
    assert most_frequent_answer(lines) == {"answer": "three", "n": 4, "truths": 3}


def test_truths_that_are_long_or_hardly_repeat_have_no_confusion():
    assert confusion([prediction(n, f"t{n // 2}") for n in range(10)]) is not None
    assert confusion([prediction(n, f"t{n}") for n in range(5)]) is None
    for task in ("caption", "loss"):
        assert confusion([prediction(n, task=task) for n in range(10)]) is None


def test_the_most_frequent_answer_is_counted_whatever_its_wording():
    lines = [prediction(n, "no" if n % 2 else "yes", "Yes!" if n % 3 else "是的", task="yesno") for n in range(12)]
    assert most_frequent_answer(lines) == {"answer": "yes", "n": 12, "truths": 6}
    assert most_frequent_answer([prediction(0, task="loss")]) is None
    captions = [prediction(n, f"a {n}", "A photo.", task="caption") for n in range(4)]
    assert most_frequent_answer(captions) == {"answer": "photo", "n": 4, "truths": 0}


# --- calibration ------------------------------------------------------------------------------------------------------


def answers_as_sure_as(right, count, seed):
    """Answers of uniform confidence c that are right with the probability `right(c)`."""
    rng = random.Random(seed)
    return [
        prediction(n, score=float(rng.random() < right(confidence)), confidence=confidence)
        for n in range(count)
        for confidence in [rng.random()]
    ]


def test_the_calibration_error_is_that_of_equal_groups():
    lines = answers_as_sure_as(lambda c: c**2, 500, seed=1)
    report = calibration(random.Random(2).sample(lines, 500))
    pairs = np.array(sorted((line["confidence"], line["score"]) for line in lines))
    groups = np.split(pairs, 10)  # [50, 2] each
    assert report["ece"] == pytest.approx(np.mean([abs(own[:, 0].mean() - own[:, 1].mean()) for own in groups]))
    assert [own["n"] for own in report["bins"]] == [50] * 10
    assert [own["value"] for own in report["bins"]] == pytest.approx([own[:, 1].mean() for own in groups])
    over = report["overconfidence"]
    assert over["value"] == pytest.approx(pairs[:, 0].mean() - pairs[:, 1].mean())
    assert over["ci_low"] > 0, "right with c² is too sure"
    assert report["ece"] > 3 * report["ece_by_chance"]


def test_a_calibrated_model_shows_the_error_of_chance():
    reports = [calibration(answers_as_sure_as(lambda c: c, 400, seed)) for seed in range(40)]
    error, chance = (np.mean([report[name] for report in reports]) for name in ("ece", "ece_by_chance"))
    assert error == pytest.approx(chance, rel=0.1)
    assert sum(own["overconfidence"]["ci_low"] <= 0 <= own["overconfidence"]["ci_high"] for own in reports) >= 35


def test_equal_confidences_share_a_group_and_few_answers_have_none():
    lines = [prediction(n, score=n % 2, confidence=0.7 if n < 90 else 0.9) for n in range(100)]
    assert [own["n"] for own in calibration(lines)["bins"]] == [100], "ten answers alone are too few"
    few = calibration(answers_as_sure_as(lambda c: c, 2 * FEWEST - 1, seed=0))
    assert (few["n"], few["bins"], few["ece"], few["ece_by_chance"]) == (39, [], None, None)
    assert few["overconfidence"]["ci_low"] is not None


def test_without_probabilities_or_right_and_wrong_there_is_no_calibration():
    assert calibration([prediction(n) for n in range(100)]) is None
    assert calibration([prediction(n, score=30.0, confidence=0.5) for n in range(100)]) is None
    one_image = calibration([prediction(n, confidence=0.5) | {"picture": "p"} for n in range(5)])
    assert one_image["overconfidence"]["ci_low"] is None


# --- lengths and languages --------------------------------------------------------------------------------------------


def test_lengths_are_words_and_chinese_characters():
    lines = [
        prediction(0, "a red star", "red"), prediction(1, "红色的星", "红 star"), prediction(2, "two", ""),
    ]  # fmt: skip
    report = answer_length(lines)
    assert report["width"] == 1
    assert report["model"] == [1, 1, 1, 0, 0]
    assert report["truth"] == [0, 1, 0, 1, 1]
    assert (report["model_mean"], report["truth_mean"], report["longest"]) == (1, pytest.approx(8 / 3), 4)
    assert answer_length([prediction(0, task="loss")]) is None


def test_a_few_endless_answers_do_not_hide_the_others():
    lines = [prediction(n, "word " * (n % 3), "word " * (5000 if n == 7 else 2)) for n in range(300)]
    report = answer_length(lines)
    assert (report["longest"], report["width"], report["model"]) == (5000, 1, [0, 0, 300])


def test_questions_are_told_apart_by_language():
    lines = [
        prediction(n, "红色" if n % 3 else "red", "红色", question="什么颜色？" if n % 3 else "Which colour?")
        for n in range(9)
    ]
    chinese, other = languages(lines)
    assert [chinese[key] for key in ("language", "n", "answers_zh", "truths_zh", "value")] == ["zh", 6, 6, 6, 1.0]
    assert [other[key] for key in ("language", "n", "answers_zh", "truths_zh", "value")] == ["other", 3, 3, 0, 0.0]
    assert len(languages(lines[:1])) == 1


# --- sheets -----------------------------------------------------------------------------------------------------------


def test_sheets_show_sure_answers_of_the_best_and_worst_scores_and_those_that_turned():
    lines = []
    for n in range(60):
        right, right_blank = n % 2, n % 3 == 0
        lines.append(prediction(n, score=right, confidence=n / 60))
        lines.append(prediction(n, score=right_blank, variant="blank"))
    sheets = sheets_of(lines)
    numbers = {name: [int(card.with_image["id"][1:]) for card in cards] for name, cards in sheets.items()}
    assert numbers["best"] == [59, 57, 55, 53, 51, 49, 47, 45, 43]
    assert numbers["worst"] == [58, 56, 54, 52, 50, 48, 46, 44, 42]
    assert all(n % 2 and n % 3 for n in numbers["helped"])
    assert all(n % 2 == 0 and n % 3 == 0 for n in numbers["misled"])
    assert {len(cards) for cards in sheets.values()} == {CARDS}
    assert all(card.with_image["id"] == card.blank["id"] for cards in sheets.values() for card in cards)
    assert sheets_of(random.Random(1).sample(lines, len(lines))) == sheets


def test_where_all_scores_are_equal_none_is_best_or_worst():
    sheets = sheets_of([prediction(n, score=1 / 3) for n in range(7)])
    assert {name: len(cards) for name, cards in sheets.items()} == {
        "best": 0, "worst": 0, "random": 7, "helped": 0, "misled": 0,
    }  # fmt: skip


def test_a_low_loss_is_best():
    lines = [prediction(n, score=float(n), task="loss", variant=v) for n in range(3) for v in ("seen", "blank")]
    lines[5] |= {"score": 9.0}
    sheets = sheets_of(lines)
    assert [card.with_image["score"] for card in sheets["best"]] == [0]
    assert [card.with_image["score"] for card in sheets["worst"]] == [2]
    assert [card.with_image["score"] for card in sheets["helped"]] == [2]


def test_thumbnails_are_read_as_they_were_written_and_damaged_ones_left_out(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 224, 224), np.uint8)
    data = thumbnail(noise)
    assert len(data) < 12_000
    write_thumbnails(tmp_path, {"a+b": [data, data], "\ud800": [data]})
    assert read_thumbnails(tmp_path) == {"a+b": [data, data], "\ud800": [data]}
    file = tmp_path / "thumbnails.jsonl"
    odd = [["x"], {"picture": "x"}, {"picture": "x", "jpeg": ['"><script>']}, {"picture": "x", "jpeg": 5}]
    file.write_text(file.read_text() + "".join(f"{json.dumps(line)}\n" for line in odd) + '{"cut', encoding="utf-8")
    assert set(read_thumbnails(tmp_path)) == {"a+b", "\ud800"}
    assert read_thumbnails(tmp_path / "none") == {}


# --- probabilities ----------------------------------------------------------------------------------------------------


def test_the_probability_of_an_answer_is_that_of_its_tokens_guessed_or_decoded():
    loaded = load(sighted(), EYE, ASSETS, "cpu")
    asks = [Ask((("user", question),)) for question in ("What colour is the star?", "有几个物体？", "hello")]
    decoded = Answering(loaded.model, loaded.tokenizer, Features(lambda _: torch.zeros(0)), [], "float32").reply(asks)
    texts = [reply.text for reply in decoded]
    answering = Answering(loaded.model, loaded.tokenizer, Features(lambda _: torch.zeros(0)), texts, "float32")
    for ask, first, second in zip(asks, decoded, answering.reply(asks), strict=True):
        prompt = answering.prompts.prompt([{"role": "user", "content": ask.messages[0][1]}]).input_ids
        with torch.inference_mode():
            ids = list(prompt)
            for _ in range(second.tokens[0]):
                ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
            table = loaded.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        total = sum(float(table[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))
        assert first.text == second.text
        assert first.tokens == second.tokens
        assert first.probability == pytest.approx(math.exp(total), rel=1e-4)
        assert second.probability == pytest.approx(math.exp(total), rel=1e-4)


def test_an_empty_answer_has_no_probability():
    assert Reply("").probability is None
    assert Reply("yes", (1e-7,), (1,)).probability == 1


def test_the_probability_of_a_choice_is_that_among_the_choices():
    question = Question("1", 0, "", (("user", "Which?"),), (), ("red",), ("blue", "red", "big red"), 1)
    task = TASKS["choice"]("choice", {"letters": False})
    verdict = task.judge(question, [Reply("", (math.log(0.1), math.log(0.3), math.log(0.2)), (1, 2, 4))])
    assert verdict.answer == "big red", "by token it is the likeliest"
    assert verdict.confidence == pytest.approx(0.2 / 0.6)
