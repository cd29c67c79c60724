"""Predictions, one line a question and variant, and the figures that they give: metrics, gains by the image, kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minimind_v.core.evaluate.ask import SEEN, VARIANTS
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.statistics import Estimate, Metric, bootstrap, difference, estimate
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.evaluate.tasks.task import Task, Verdict, statistics_of

if TYPE_CHECKING:
    from minimind_v.core.evaluate.measure import Plan

Line = dict[str, Any]
PREDICTIONS = "predictions.jsonl"  # in the folder of an evaluation
KINDS = 20  # that are shown, the most frequent ones
SCORE = "score"  # the metric of predictions that name no task


def lines_of(plan: Plan, base: str, verdicts: Mapping[str, Sequence[tuple[Question, Verdict]]]) -> list[Line]:
    """The predictions of all variants; `base` is the name of the task in TASKS."""
    return [
        {
            "id": question.id,
            "picture": plan.cluster(question),
            "question": question.text,
            "answer": verdict.answer,
            "truth": verdict.truth,
            "score": verdict.score,
            "variant": variant,
            "confidence": verdict.confidence,
            "kind": question.kind,
            "task": base,
            "statistics": {name: list(sums) for name, sums in verdict.statistics.items()},
        }
        for variant in VARIANTS
        for question, verdict in verdicts.get(variant, [])
    ]


def metrics_for(lines: Sequence[Line]) -> tuple[Metric, ...]:
    """The metrics of the task of these predictions, by which any have a value; of lines without a task, the score."""
    kind = TASKS.get(str(lines[0].get("task"))) if lines else None
    if kind is None or any("statistics" not in line for line in lines):
        is_share = all(0 <= float(line[SCORE]) <= 1 for line in lines)
        return (Metric(SCORE, is_share=is_share),)
    names = {name for line in lines for name in line["statistics"]}
    return tuple(metric for metric in kind.metrics if metric.name in names)


def rows_of(metric: Metric, lines: Sequence[Line]) -> np.ndarray:
    """The statistics of a metric [n, k] of these predictions."""
    if metric.name == SCORE:
        return np.array([[float(line[SCORE]), 1.0] for line in lines]).reshape(-1, 2)
    return statistics_of(metric, [line["statistics"] for line in lines])


def clusters_of(lines: Sequence[Line]) -> list[str]:
    """The image of each prediction; a line without one is on its own."""
    return [str(line.get("picture") or f"question {line['id']}") for line in lines]


def by_variant(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The predictions of each variant; a line without a variant has seen its image."""
    variants: dict[str, list[Line]] = {}
    for line in lines:
        variants.setdefault(str(line.get("variant") or SEEN), []).append(line)
    return variants


def measured(lines: Sequence[Line]) -> list[Estimate]:
    """All metrics of predictions of one variant."""
    clusters = clusters_of(lines)
    return [estimate(metric, rows_of(metric, lines), clusters) for metric in metrics_for(lines)]


def checks(lines: Sequence[Line]) -> dict[str, tuple[float, float] | None]:
    """The interval of the cluster bootstrap by metric, beside those of `measured`; of plain ratios, which are fast."""
    clusters = clusters_of(lines)
    ratios = [metric for metric in metrics_for(lines) if metric.value is Metric.value]
    return {metric.name: bootstrap(metric, rows_of(metric, lines), clusters) for metric in ratios}


def gain_metric(task: type[Task]) -> Metric:
    """The metric by which a task says what the image adds."""
    return next(metric for metric in task.metrics if metric.name == task.gain)


def visual_gain(lines: Sequence[Line]) -> dict[str, Any]:
    """How much better the image makes the answers than each replacement: value, interval and p, paired.

    A replacement that no question has gives None.
    """
    variants = by_variant(lines)
    with_image = {line["id"]: line for line in variants.get(SEEN, [])}
    kind = TASKS[lines[0]["task"]]
    metric = gain_metric(kind)
    gains: dict[str, Any] = {}
    for variant in VARIANTS[1:]:
        others = variants.get(variant, [])
        if not others:
            gains[variant] = dict.fromkeys(("value", "ci_low", "ci_high", "p"))
            continue
        pairs = [with_image[line["id"]] for line in others]
        sides = rows_of(metric, others), rows_of(metric, pairs)
        worse, better = reversed(sides) if kind.lower_is_better else sides
        result = difference(metric, worse, better, clusters_of(pairs))
        report = result.report(difference=True)
        gains[variant] = {"value": report["difference"]} | {key: report[key] for key in ("ci_low", "ci_high", "p")}
    return gains


def main_values(lines: Sequence[Line]) -> dict[str, float | None]:
    """The task's main metric by variant; None for one that no question has."""
    variants, metric = by_variant(lines), gain_metric(TASKS[lines[0]["task"]])
    results = {
        name: estimate(metric, rows_of(metric, own), clusters_of(own)).report() for name, own in variants.items()
    }
    return {variant: results[variant]["value"] if variant in results else None for variant in VARIANTS}


def kinds_of(lines: Sequence[Line]) -> dict[str, Any]:
    """The task's main metric and the gains for each kind of question; empty where rows name no kinds."""
    names = sorted({line["kind"] for line in lines if line["kind"]})
    kinds = {}
    for name in names:
        own = [line for line in lines if line["kind"] == name]
        with_image = by_variant(own)[SEEN]
        metric = gain_metric(TASKS[own[0]["task"]])
        main = estimate(metric, rows_of(metric, with_image), clusters_of(with_image))
        kinds[name] = main.report() | {"visual_gain": visual_gain(own)}
    return kinds


def most_frequent_kinds(kinds: Mapping[str, Any]) -> tuple[list[str], int]:
    """The kinds that are shown, the most frequent first, and how many others there are."""
    names = sorted(kinds, key=lambda name: (-kinds[name]["n"], name))
    return names[:KINDS], len(names[KINDS:])
