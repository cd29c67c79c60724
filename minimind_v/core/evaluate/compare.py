"""`mmv compare`: the predictions of two models, or of several seeds of two settings, paired on the same questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimind_v.core.errors import DataError, MissingInput, UsageError
from minimind_v.core.evaluate.ask import SEEN
from minimind_v.core.evaluate.results import Line, clusters_of, metrics_for, rows_of
from minimind_v.core.evaluate.statistics import Estimate, Metric, difference, rows_to_see, seeds_difference
from minimind_v.core.rows.row import parse_json

PREDICTIONS = "predictions.jsonl"
NEEDED = ("id", "score")  # keys of a prediction


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
    if not file.is_file():
        raise MissingInput(f"no predictions at {file} — `mmv eval --task` writes them")
    data = file.read_bytes()
    if file.suffix == ".json":  # a report, on one line or several
        data = json.dumps(parse_json(data, f"{file}: ")).encode()
    rows = enumerate(data.splitlines(), 1)  # of bytes: a text may have other ends of lines, in an answer
    lines = {f"{file}:{number}": _line(f"{file}:{number}", row) for number, row in rows if row.strip()}
    if len(lines) == 1 and isinstance(named := next(iter(lines.values())).get("predictions"), str):
        return read_predictions(Path(named) if Path(named).is_file() else file.parent / Path(named).name)
    with_image: dict[str, Line] = {}
    for location, line in lines.items():
        _check_line(location, line)
        if str(line.get("variant") or SEEN) == SEEN:
            if str(line["id"]) in with_image:
                raise DataError(f"{location}: a second prediction for the question {line['id']}")
            with_image[str(line["id"])] = line
    if not with_image:
        raise DataError(f"{file}: no prediction for a question with its image")
    return Predictions(file, with_image)


def _line(location: str, text: bytes) -> Line:
    value = parse_json(text, f"{location}: ")
    if not isinstance(value, dict):
        raise DataError(f"{location}: not a JSON object")
    return value


def _check_line(location: str, line: Line) -> None:
    """Raises DataError for a line that is no prediction."""
    if missing := [key for key in NEEDED if key not in line]:
        raise DataError(f"{location}: no {' and no '.join(missing)} — not a prediction of `mmv eval --task`")
    sums = line.get("statistics", {})
    rows = [[line["score"]], *(sums.values() if isinstance(sums, dict) else [None])]
    if not all(isinstance(row, list) and row and all(isinstance(value, int | float) for value in row) for row in rows):
        raise DataError(f"{location}: score or statistics are no numbers — not a prediction of `mmv eval --task`")


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
    report: dict[str, Any] = {
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
