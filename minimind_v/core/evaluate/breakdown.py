"""What the answers are like, beside the metrics: mistaken for what, how sure, how long, in which language.

All figures are those of predictions with their images. A figure that the data do not give is None.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from minimind_v.core.evaluate.normalise import HAN
from minimind_v.core.evaluate.results import Line, clusters_of, gain_metric, rows_of
from minimind_v.core.evaluate.statistics import Metric, estimate
from minimind_v.core.evaluate.tasks import TASKS

LABELS = 10  # true answers that the confusion tells apart; the others are together
BINS, FEWEST = 10, 20  # of the calibration at most; questions in each at least
BARS = 12  # of the lengths, at most
WORD = re.compile(rf"{HAN.pattern}|[^\s{HAN.pattern[1:-1]}]+")
OVERCONFIDENCE = Metric("overconfidence", is_share=False, bounds=(-1, 1))
RIGHT = Metric("right")


def breakdown(lines: Sequence[Line]) -> dict[str, Any]:
    """All of them."""
    return {
        "most_frequent_answer": most_frequent_answer(lines),
        "confusion": confusion(lines),
        "calibration": calibration(lines),
        "answer_length": answer_length(lines),
        "language": languages(lines),
    }


def most_frequent_answer(lines: Sequence[Line]) -> dict[str, Any] | None:
    """The answer that is given most, how often, and how often it is the true one; None without answers."""
    task = TASKS[lines[0]["task"]]
    if task.answers == "none":
        return None
    answers = Counter(task.label(line["answer"]) for line in lines)
    answer = min(answers, key=lambda label: (-answers[label], label))
    return {
        "answer": _wordings(lines).get(answer, answer),
        "n": answers[answer],
        "truths": sum(task.label(line["truth"]) == answer for line in lines),
    }


def confusion(lines: Sequence[Line]) -> dict[str, Any] | None:
    """How often each true answer (row) was answered by which (column); the last row and column are all others.

    None where true answers are long, or hardly ever the same: on average less than twice.
    """
    task = TASKS[lines[0]["task"]]
    if task.answers != "short":
        return None
    pairs = [(task.label(line["truth"]), task.label(line["answer"])) for line in lines]
    truths = Counter(truth for truth, _ in pairs)
    labels = sorted(truths, key=lambda truth: (-truths[truth], truth))[:LABELS]
    if len(lines) < 2 * len(truths):
        return None
    numbers = {label: number for number, label in enumerate(labels)}
    counts = np.zeros((len(labels) + 1, len(labels) + 1), int)
    for truth, answer in pairs:
        counts[numbers.get(truth, -1), numbers.get(answer, -1)] += 1
    wordings = _wordings(lines)
    return {"labels": [wordings[label] for label in labels], "counts": counts.tolist()}


def _wordings(lines: Sequence[Line]) -> dict[str, str]:
    """How true answers are mostly written, by their label: `three`, which a task may compare as `3`."""
    task, texts = TASKS[lines[0]["task"]], Counter(line["truth"] for line in lines)
    return {task.label(text): text for text in sorted(texts, key=lambda text: (texts[text], text))}


def calibration(lines: Sequence[Line]) -> dict[str, Any] | None:
    """How sure the model was against how often it was right, for answers of a known probability.

    `overconfidence` is the mean probability less the mean score. `bins` hold equally many answers, at least FEWEST, by
    probability; there are none for fewer than two such bins. `ece` is their expected calibration error, and
    `ece_by_chance` that of a calibrated model with independent answers. None where no answer has a probability.
    """
    sure = [line for line in lines if line["confidence"] is not None]
    if not sure or not all(0 <= line["score"] <= 1 for line in sure):
        return None
    sure.sort(key=lambda line: (line["confidence"], str(line["id"])))
    rows = [[line["confidence"] - line["score"], 1.0] for line in sure]
    bins = [_bin(own) for own in _by_confidence(sure)] if len(sure) >= 2 * FEWEST else []
    error = sum(own["n"] * abs(own["confidence"] - own["value"]) for own in bins) / len(sure)
    # A normal deviate is sqrt(2 / pi) of its standard deviation away from 0, on average.
    chance = sum(own["n"] * np.sqrt(2 / np.pi * own.pop("variance") / own["n"]) for own in bins) / len(sure)
    return {
        "n": len(sure),
        "confidence": float(np.mean([line["confidence"] for line in sure])),
        "score": float(np.mean([line["score"] for line in sure])),
        "overconfidence": estimate(OVERCONFIDENCE, np.array(rows), clusters_of(sure)).report(),
        "ece": error if bins else None,
        "ece_by_chance": float(chance) if bins else None,
        "bins": bins,
    }


def _by_confidence(lines: Sequence[Line]) -> list[list[Line]]:
    """Sorted lines in bins; those of equal confidence together."""
    size = max(FEWEST, len(lines) / BINS)
    bins: list[list[Line]] = [[]]
    for line in lines:
        if len(bins[-1]) >= size and line["confidence"] > bins[-1][-1]["confidence"]:
            bins.append([])
        bins[-1].append(line)
    if len(bins) > 1 and len(bins[-1]) < FEWEST:
        rest = bins.pop()
        bins[-1] += rest
    return bins


def _bin(lines: Sequence[Line]) -> dict[str, Any]:
    confidences = np.array([line["confidence"] for line in lines])
    report = estimate(RIGHT, np.array([[line["score"], 1.0] for line in lines]), clusters_of(lines)).report()
    del report["name"]
    variance = float((confidences * (1 - confidences)).mean())
    return {"confidence": float(confidences.mean()), "variance": variance} | report


def answer_length(lines: Sequence[Line]) -> dict[str, Any] | None:
    """How many words answers and truths have, where a Chinese character counts as a word; None without answers.

    `model` and `truth` count those of each `width` lengths from 0; the last are those of that length or more.
    """
    if TASKS[lines[0]["task"]].answers == "none":
        return None
    model, truth = (np.array([len(WORD.findall(line[key])) for line in lines]) for key in ("answer", "truth"))
    both = np.concatenate([model, truth])
    longest, top = int(both.max()), int(np.quantile(both, 0.99, method="higher"))
    width = top // BARS + 1
    bars = top // width + 1
    counts = (np.bincount(np.minimum(own // width, bars - 1), minlength=bars).tolist() for own in (model, truth))
    means = {"model_mean": float(model.mean()), "truth_mean": float(truth.mean())}
    return means | {"longest": longest, "width": width} | dict(zip(("model", "truth"), counts, strict=True))


def languages(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For Chinese questions and for others: the main metric, and how many answers and truths have Chinese in them."""
    metric = gain_metric(TASKS[lines[0]["task"]])
    groups: dict[str, list[Line]] = {"zh": [], "other": []}
    for line in lines:
        groups["zh" if HAN.search(line["question"]) else "other"].append(line)
    return [
        {"language": language}
        | {f"{key}s_zh": sum(HAN.search(line[key]) is not None for line in own) for key in ("answer", "truth")}
        | estimate(metric, rows_of(metric, own), clusters_of(own)).report()
        for language, own in groups.items()
        if own
    ]
