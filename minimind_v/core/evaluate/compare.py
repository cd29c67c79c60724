"""`mmv compare`: the predictions of two models, or of several seeds of two settings, paired on the same questions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from minimind_v.core.errors import DataError, MissingInput, UsageError, shorten
from minimind_v.core.evaluate.ask import SEEN
from minimind_v.core.evaluate.results import PREDICTIONS, Line, clusters_of, metrics_for, rows_of
from minimind_v.core.evaluate.statistics import Estimate, Metric, difference, rows_to_see, seeds_difference
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.files import bounded_lines
from minimind_v.core.rows.row import parse_json

NEEDED = ("id", "score")  # keys of a prediction
LONGEST, MOST_BYTES = 16 << 20, 4 << 30  # bytes of a report or a line of predictions, and of a file of these
MOST = 1e15  # of a score or a sum: squares of larger ones lose the digits of others


@dataclass(frozen=True)
class Predictions:
    """The predictions of one evaluation, of questions with their images, by id."""

    path: Path
    lines: dict[str, Line]


def read_predictions(path: Path) -> Predictions:
    """Read `predictions.jsonl`, the folder that holds it, or the report that names it.

    Raises MissingInput or DataError.
    """
    file = path / PREDICTIONS if path.is_dir() else path
    lines = _lines(file)
    first = list(islice(lines, 1))
    if first and isinstance(named := first[0][1].get("predictions"), str):  # a report
        file = Path(named) if os.path.isfile(named) else file.parent / Path(named).name
        first, lines = [], _lines(file, f", which {path} names")
    with_image: dict[str, Line] = {}
    for number, line in chain(first, lines):
        _check(line, f"{file}:{number}: ")
        if str(line.get("variant") or SEEN) == SEEN:
            if str(line["id"]) in with_image:
                raise DataError(f"{file}:{number}: a second prediction for the question {line['id']}")
            with_image[str(line["id"])] = line
    if not with_image:
        raise DataError(f"{file}: no prediction for a question with its image")
    return Predictions(file, with_image)


def _lines(file: Path, note: str = "") -> Iterator[tuple[int, Line]]:
    """The objects in a file with the numbers of their lines; a report is one, on one line or several.

    `note` says who names the file.
    """
    if not os.path.isfile(file):  # unlike Path.is_file, for any text
        what = "a pipe, a socket or a device is" if os.path.exists(file) else "no predictions"
        raise MissingInput(f"{what} at {shorten(str(file))}{note} — `mmv eval --task` writes predictions to a file")
    try:
        if file.stat().st_size > MOST_BYTES:
            raise DataError(f"{file}: larger than {MOST_BYTES:,} bytes — name the predictions of `mmv eval --task`")
        if file.suffix == ".json":
            with file.open("rb") as report:
                text = report.read(LONGEST + 1)
            lines: Iterable[bytes | None] = [text if len(text) <= LONGEST else None]
        else:
            lines = bounded_lines(file, LONGEST)
        for number, line in enumerate(lines, 1):
            if line is None:
                raise DataError(f"{file}:{number}: longer than {LONGEST:,} bytes, and no prediction")
            if line.strip():
                yield number, _object(line, f"{file}:{number}: ")
    except OSError as error:
        raise MissingInput(f"{file} cannot be read ({error.strerror})") from None


def _object(line: bytes, at: str) -> Line:
    try:
        value = parse_json(line.decode(), at)
    except UnicodeDecodeError:
        raise DataError(f"{at}the text is not UTF-8 — name the predictions of `mmv eval --task`") from None
    if not isinstance(value, dict):
        raise DataError(f"{at}not a JSON object")
    return value


def _check(line: Line, at: str) -> None:
    """Raises DataError for an object that is no prediction; `at` begins the message."""
    if missing := [key for key in NEEDED if key not in line]:
        raise DataError(f"{at}no {' and no '.join(missing)} — not a prediction of `mmv eval --task`")
    if not _is_number(line["score"]):
        raise DataError(f"{at}the score {line['score']!r:.80} is no number")
    statistics = line.get("statistics", {})
    good = isinstance(statistics, dict) and all(
        isinstance(sums, list) and len(sums) > 1 and all(map(_is_number, sums)) for sums in statistics.values()
    )
    if not good:
        raise DataError(f"{at}the statistics are not lists of numbers by metric")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < MOST


def compare(first: Sequence[Predictions], second: Sequence[Predictions]) -> dict[str, Any]:
    """`second` less `first`, one evaluation each or one for each seed, on the questions that all of them have.

    Raises DataError where these are no questions, or not the same, or without a common metric, UsageError for
    different tasks.
    """
    runs = [*first, *second]
    _check_tasks(runs)
    names = [name for name in runs[0].lines if all(name in run.lines for run in runs)]
    if not names:
        raise DataError(f"{runs[0].path} and {runs[1].path} have no question in common — evaluate the same data")
    _check_questions(runs, names)
    sides = [[[run.lines[name] for name in names] for run in side] for side in (first, second)]
    clusters = clusters_of(sides[0][0])
    metrics = _shared_metrics([lines for side in sides for lines in side])
    if not metrics:
        raise DataError(f"{runs[0].path} and {runs[1].path} have no metric in common — evaluate both by the same task")
    _check_statistics(runs, names, metrics)
    task = TASKS.get(str(sides[0][0][0].get("task")))
    report: dict[str, Any] = {
        "lower_is_better": task is not None and task.lower_is_better,
        "first": [str(run.path) for run in first],
        "second": [str(run.path) for run in second],
        "rows": len(names),
        "unpaired": sum(len(run.lines) - len(names) for run in runs),
        "metrics": [],
    }
    spreads = []
    for metric in metrics:
        rows = [[rows_of(metric, lines) for lines in side] for side in sides]
        if len(runs) == 2:
            result = difference(metric, rows[0][0], rows[1][0], clusters)
        else:
            result, spread = seeds_difference(metric, rows[0], rows[1], clusters)
            spreads.append({"name": metric.name, **_spread(spread.first, spread.second, spread.deviations)})
        report["metrics"].append(_described(result))
    if spreads:
        report["seeds"] = spreads
    return report | {"changed": _changed(names, sides)}


def _described(result: Estimate) -> dict[str, Any]:
    return result.report(difference=True) | {"rows_to_see_half": rows_to_see(result)}


def _spread(
    first: Sequence[float], second: Sequence[float], deviations: tuple[float | None, float | None]
) -> dict[str, Any]:
    """The values of each seed, and their standard deviations."""
    return {"first": list(first), "second": list(second), "deviations": list(deviations)}


def _shared_metrics(runs: Sequence[Sequence[Line]]) -> list[Metric]:
    """The metrics that all runs have; shares only where they are shares in all."""
    tables: list[Mapping[str, Metric]] = [{metric.name: metric for metric in metrics_for(lines)} for lines in runs]
    return [
        min((table[name] for table in tables), key=lambda metric: metric.is_share)
        for name in tables[0]
        if all(name in table for table in tables)
    ]


def _check_tasks(runs: Sequence[Predictions]) -> None:
    tasks = {str(next(iter(run.lines.values())).get("task")): run.path for run in runs}
    if len(tasks) > 1:
        raise UsageError("different tasks: " + ", ".join(f"{path} has {task}" for task, path in tasks.items()))


def _check_questions(runs: Sequence[Predictions], names: Sequence[str]) -> None:
    """Raises DataError where one id names different questions."""
    for name in names:
        for run in runs[1:]:
            for key in ("question", "truth"):
                pair = runs[0].lines[name].get(key), run.lines[name].get(key)
                if None not in pair and pair[0] != pair[1]:
                    raise DataError(
                        f"the question {name} differs: {key} {pair[0]!r:.80} in {runs[0].path}, {pair[1]!r:.80} in "
                        f"{run.path} — evaluate the same data"
                    )


def _check_statistics(runs: Sequence[Predictions], names: Sequence[str], metrics: Sequence[Metric]) -> None:
    """Raises DataError where a metric has more sums of one question than of another."""
    for metric in metrics:
        lengths: set[int] = set()
        for run in runs:
            for name in names:
                lengths |= {len(run.lines[name].get("statistics", {}).get(metric.name, ()))} - {0}
                if len(lengths) > 1:
                    raise DataError(
                        f"{run.path}: the statistics of {metric.name} of the question {name} are not as many as those "
                        "of others — evaluate again with `mmv eval --task`"
                    )
                sums = run.lines[name].get("statistics", {}).get(metric.name, ())
                if metric.is_share and metric.link and any(number > 1 for number in sums):
                    raise DataError(
                        f"{run.path}: {metric.name} was computed by an earlier version — evaluate again with "
                        "`mmv eval --task`"
                    )


def direction(metric: Mapping[str, Any], lower_is_better: bool) -> str:
    """What a difference shows about B; empty where it shows nothing. Only of a loss it is known what is better."""
    if metric["ci_low"] is None or metric["ci_low"] <= 0 <= metric["ci_high"]:
        return ""
    is_higher = metric["ci_low"] > 0
    if lower_is_better:
        return f"{'worse' if is_higher else 'better'} in B (lower is better)"
    return f"{'higher' if is_higher else 'lower'} in B"


def _changed(names: Sequence[str], sides: Sequence[Sequence[Sequence[Line]]]) -> list[dict[str, Any]]:
    """The questions whose score changed, of several seeds their mean; the largest change first."""
    changed = []
    for number, name in enumerate(names):
        own = [[lines[number] for lines in side] for side in sides]
        scores = [float(np.mean([line["score"] for line in side])) for side in own]
        if scores[0] != scores[1]:
            answers = {
                side: [line.get("answer") for line in lines] if len(lines) > 1 else lines[0].get("answer")
                for side, lines in zip(("first", "second"), own, strict=True)
            }
            known_fields = {key: own[0][0].get(key) for key in ("picture", "question", "truth")}
            scored = {"score_first": scores[0], "score_second": scores[1]}
            changed.append({"id": name, **known_fields, **answers, **scored})
    return sorted(changed, key=lambda entry: -abs(entry["score_second"] - entry["score_first"]))
