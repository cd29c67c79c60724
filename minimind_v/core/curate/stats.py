"""Statistics of a data set, and what training makes of it."""

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
from minimind_v.core.rows.subset import SampledRows

SAMPLE = 10_000  # rows that are looked at: a few seconds, and a hundred rows above the 99th percentile
BINS = 20  # of the histogram, at most
QUANTILES = {"min": 0, "p5": 5, "p50": 50, "p95": 95, "p99": 99, "max": 100}


@dataclass(frozen=True)
class TypicalRow:
    """What a row of a batch has on average, padding included."""

    length: float
    pictures: float
    supervised: float


# Seconds of a run, and how they are known: of a recipe, its typical row, its rows and updates of all epochs.
TimeOf = Callable[[RunConfig, TypicalRow, float, int], dict[str, Any]]


@dataclass(frozen=True)
class Outlook:
    """What was counted in some rows of a set, in the order in which a run reads them."""

    counted: Counted
    counted_rows: int  # rows, of all
    steps: int  # of all epochs
    planned_rows: int  # that the epochs ask for, broken ones included

    @property
    def samples(self) -> float:
        """Rows that go through the model."""
        return self.counted.used / self.counted_rows * self.planned_rows


def foresee(
    rows: RowStore,
    encoder: PromptEncoder,
    config: RunConfig,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outlook:
    """Count `limit` rows (not given: SAMPLE). No picture is read.

    A sample is the beginning of the order in which the first epoch reads the rows, cut into batches as that epoch is.
    Raises DataError where no row can be used.
    """
    counted = Counted()
    every = plan_batches(rows, encoder, config)
    size = min(limit or SAMPLE, len(rows))
    sampled = rows if size == len(rows) else SampledRows(rows, every.order(0)[:size])
    count(plan_batches(sampled, encoder, config, counted), counted, progress)
    if not counted.used:
        _, first = min(counted.first_skipped.values())
        raise DataError(f"none of {size} rows is usable; the first problem: {first}")
    return Outlook(counted, size, config.epochs * every.steps_per_epoch, config.epochs * len(rows))


def describe_rows(
    rows: RowStore,
    encoder: PromptEncoder,
    config: RunConfig,
    time_of: TimeOf,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """What rows are like, as a program reads it, and how long a run over the whole set would take by `time_of`.

    As `foresee` otherwise.
    """
    outlook = foresee(rows, encoder, config, limit, progress)
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
    """What was counted, without the foretelling."""
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
            "refused": skipped > config.data.bad_rows * count,  # more than a run puts up with
        },
        "text_rows": counted.text_rows,  # with pictures that no mark shows
        "notes": dict(counted.notes),  # rows that are read in another way than they are written
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
    """Counts between round edges. The last bin has all from the 99.5th percentile on: a long tail hides the rest."""
    if not values:
        return {"edges": [], "counts": []}
    low, high = min(values), int(np.percentile(values, 99.5, method="higher"))
    width = next(
        step * 10**power for power in range(9) for step in (1, 2, 5) if (high - low) / (step * 10**power) < BINS - 1
    )
    edges = list(range(low // width * width, high + width + 1, width))
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return {"edges": edges, "counts": [int(number) for number in counts]}
