"""Statistics of a data set, and of training on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.curate.count import Counted, count, plan_batches
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.errors import DataError
from minimind_v.core.rows.row import RowStore

SAMPLE = 10_000  # rows: a few seconds, and a hundred rows above the 99th percentile
BINS = 20  # of the histogram, at most
QUANTILES = {"min": 0, "p5": 5, "p50": 50, "p95": 95, "p99": 99, "max": 100}


@dataclass(frozen=True)
class TypicalRow:
    """The mean of a batch's rows, padding included."""

    length: float
    pictures: float
    supervised: float


# The seconds of a run and their source, from a recipe, its typical row, and the rows and steps of all epochs.
TimeOf = Callable[[RunConfig, TypicalRow, float, int], dict[str, Any]]


@dataclass(frozen=True)
class SampleCount:
    """Counts over the first rows that a run reads."""

    counted: Counted
    counted_rows: int
    steps: int  # of all epochs
    planned_rows: int  # of all epochs, broken ones included

    @property
    def samples(self) -> float:
        """Usable rows of all epochs."""
        return self.counted.used / self.counted_rows * self.planned_rows


def count_sample(
    rows: RowStore,
    encoder: PromptEncoder,
    config: RunConfig,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SampleCount:
    """Count `limit` rows (default: SAMPLE). No picture file is read.

    A sample is the first rows of the first epoch, in the batches of that epoch. Raises DataError if no row is usable.
    """
    counted = Counted()
    every = plan_batches(rows, encoder, config)
    size = min(limit or SAMPLE, len(rows))
    sampled = np.zeros(len(rows), bool)
    sampled[every.order(0)[:size]] = True
    count(plan_batches(rows, encoder, config, counted, sampled), counted, progress)
    if not counted.used:
        _, first = min(counted.first_skipped.values())
        raise DataError(f"none of {size} rows is usable; the first problem: {first}")
    return SampleCount(counted, size, config.epochs * every.steps_per_epoch, config.epochs * len(rows))


def describe_rows(
    rows: RowStore,
    encoder: PromptEncoder,
    config: RunConfig,
    time_of: TimeOf,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Statistics of rows as JSON for programs, and by `time_of` the time of a run over all rows; as `count_sample`."""
    outlook = count_sample(rows, encoder, config, limit, progress)
    counted, count, steps, samples = outlook.counted, outlook.counted_rows, outlook.steps, outlook.samples
    typical = TypicalRow(
        *(total / counted.used for total in (counted.padded, counted.pictures_kept, counted.supervised))
    )
    return {
        "file": str(rows.path),
        "stage": config.stage,
        "rows": len(rows),
        "looked_at": count,
        "sample": count < len(rows),
        **_facts(counted, encoder, config, count),
        "training": {
            "preset_hidden_size": config.model.hidden_size,
            "epochs": config.epochs,
            "batch_size": config.data.batch_size,
            "accumulate": config.accumulate,
            "updates": steps,
            "supervised_tokens": round(counted.supervised / counted.used * samples),
        },
        "time": time_of(config, typical, samples, steps),
    }


def _facts(counted: Counted, encoder: PromptEncoder, config: RunConfig, count: int) -> dict[str, Any]:
    """The counts, without the forecast."""
    length, skipped = config.data.max_length, counted.skipped.total()
    return {
        "turns": quantiles(counted.turns),
        "images": quantiles(counted.pictures),
        "tokens": {name: quantiles(getattr(counted, name)) for name in ("total", "prompt", "answers", "images")},
        "tokens_per_image": encoder.tokens_per_image,
        "histogram": histogram(counted.total),
        "languages": {name: rows / count for name, rows in counted.languages.most_common()},
        "max_length": length,
        "skipped": {
            "rows": skipped,
            "share": skipped / count,
            "kinds": dict(counted.skipped.most_common()),
            "first": {kind: text for kind, (_, text) in counted.first_skipped.items()},
            "refused": skipped > config.data.bad_rows * count,  # by training
        },
        "text_rows": counted.text_rows,  # with pictures and no mark
        "notes": dict(counted.notes),  # rows by how their reading differs from their text
        "cut": {
            "rows": counted.cut,
            "share": counted.cut / count,
            "turns": counted.turns_lost,
            "answer_tokens": counted.answers_lost,
            "answer_tokens_share": counted.answers_lost / (counted.supervised + counted.answers_lost),
        },
        "padding": {
            "batches": 1 - counted.kept / counted.padded,
            "fixed": 1 - counted.kept / (counted.used * length),
        },
    }


def quantiles(values: Sequence[int]) -> dict[str, float]:
    """Quantiles, mean and sum of whole numbers; empty for none."""
    if not values:
        return {}
    percentiles = np.percentile(values, list(QUANTILES.values()), method="nearest")
    named = {name: int(value) for name, value in zip(QUANTILES, percentiles, strict=True)}
    return named | {"mean": round(float(np.mean(values)), 2), "sum": int(np.sum(values))}


def histogram(values: Sequence[int]) -> dict[str, list[int]]:
    """Counts between round edges. The last bin has all above the 99.5th percentile, lest a long tail hide the rest."""
    if not values:
        return {"edges": [], "counts": []}
    low, high = min(values), int(np.percentile(values, 99.5, method="higher"))
    width = next(
        step * 10**power for power in range(9) for step in (1, 2, 5) if (high - low) / (step * 10**power) < BINS - 1
    )
    edges = list(range(low // width * width, high + width + 1, width))
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return {"edges": edges, "counts": [int(number) for number in counts]}
