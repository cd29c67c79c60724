"""`report.html`: one page about a run, from the files in its folder."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from minimind_v.core.errors import DataError, MissingInput
from minimind_v.core.files import object_in
from minimind_v.core.monitor.metrics import read_lines, read_metrics
from minimind_v.core.monitor.records import EVALUATIONS, REPORTED, flatten, is_number, read_part
from minimind_v.core.pages.frame import figures, page, write_page
from minimind_v.core.pages.plot import Band, Points, curves
from minimind_v.core.wording import plural

SHOWN = 5  # damaged records that are listed one by one
RECENT = 10  # logged steps whose loss is averaged, where they lie in the last tenth of the run
LABELS = {
    "updates": "steps",
    "samples": "samples",
    "tokens": "tokens",
    "supervised_tokens": "supervised tokens",
    "seconds": "time",
    "evaluation_seconds": "of this, evaluations",
    "memory_bytes": "memory",
    "disk_bytes": "disk",
    "features_bytes": "and the feature cache",
    "cost": "cost",
}
MANIFEST: dict[str, type] = {"stage": str, "config": dict, "fingerprints": dict, "versions": dict, "starts": list}
FORECAST: dict[str, type] = dict.fromkeys((*LABELS, "price_per_hour"), float) | {"config": dict, "how": str}


@dataclass(frozen=True)
class RunRecords:
    """The records in a run folder; empty if a file is missing."""

    folder: Path
    metrics: list[dict[str, Any]]  # one per logged step
    events: list[dict[str, Any]]
    manifest: dict[str, Any]
    forecast: dict[str, Any]
    damaged: list[str]  # `file:line: problem` of each unreadable record
    watched: list[dict[str, Any]] = field(default_factory=list)  # events of `mmv eval --watch`

    @property
    def evaluations(self) -> dict[str, list[dict[str, Any]]]:
        """Evaluations by a task, the last of each step, in the order of the steps; by what was measured."""
        by_step: dict[str, dict[int, dict[str, Any]]] = {}
        for event in (*self.events, *self.watched):
            if scores := event.get("evaluation"):
                title = f"{scores['task']} on {scores['data']}"
                by_step.setdefault(title, {})[event["step"]] = scores | {"step": event["step"]}
        return {title: [own[step] for step in sorted(own)] for title, own in by_step.items()}

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [event["validation"] for event in self.events if "validation" in event]

    @property
    def warnings(self) -> list[tuple[int, str]]:
        return [(event["step"], event["warning"]) for event in self.events if "warning" in event]

    @property
    def recalled(self) -> dict[str, dict[str, Any]]:
        """Results on the run's `own` rows, and on earlier training rows `before` and `after` the run."""
        return {when: recall for event in self.events for when, recall in event.get("recalled", {}).items()}

    @property
    def last(self) -> dict[str, Any]:
        """The last logged step."""
        return self.metrics[-1]

    @property
    def step(self) -> int:
        """The last step in any record: a run saves, and stops, between two logged steps, too."""
        return max(record["step"] for record in (*self.events, self.last))


def find_run(path: Path, out: Path | None = None) -> Path:
    """The run folder; `path` is the folder, its weights, an --out with one run, or the name of a run in `out`.

    Raises MissingInput.
    """
    named = out / path if out else path
    path = path.resolve() if path.name in ("", "..") else path
    stem = path.with_suffix("") if path.name else path  # the root has no name
    of_best = stem.with_name(stem.name.removesuffix("_best")) if stem.name.removesuffix("_best") else stem
    for folder in (path, stem, of_best, *([path.parent] if path.is_file() else [])):
        if (folder / "metrics.jsonl").is_file():
            return folder
    runs = sorted(file.parent for file in path.glob("*/metrics.jsonl"))
    if len(runs) == 1:
        return runs[0]
    if (named / "metrics.jsonl").is_file():
        return named
    several = ", ".join(map(str, runs))
    raise MissingInput(
        f"{path} contains several runs — name one of {several}" if runs else
        f"no run in {path}: metrics.jsonl is missing — name the run folder that `mmv train` printed"
    )  # fmt: skip


def read_run(folder: Path) -> RunRecords:
    """The records of a run, finished or not. Raises MissingInput or DataError."""
    damaged: list[str] = []
    metrics = read_metrics(folder / "metrics.jsonl", damaged.append, REPORTED)
    events = list(read_lines(folder / "events.jsonl", damaged.append))
    manifest = read_part(folder / "manifest.json", MANIFEST, damaged.append)
    forecast = read_part(folder / "forecast.json", FORECAST, damaged.append)
    watched = list(read_lines(folder / EVALUATIONS, damaged.append))
    return RunRecords(folder, metrics, events, manifest, forecast, damaged, watched)


def write_report(folder: Path, warn: Callable[[str], object] = lambda _: None) -> Path:
    """Write the page into the run folder; `warn` gets damaged records. Raises MissingInput, DataError, RunError."""
    path, run = folder / "report.html", read_run(folder)
    try:
        text = report_page(run)
    except RecursionError:
        raise DataError(f"{folder / 'manifest.json'}: nested too deeply — remove it") from None
    write_page(path, text)
    for trouble in run.damaged[:SHOWN]:
        warn(f"{trouble}; left out of the report")
    if len(run.damaged) > SHOWN:
        warn(f"{folder}: {len(run.damaged) - SHOWN:,} more damaged records are left out of the report")
    return path


def report_page(run: RunRecords) -> str:
    """The page."""
    last = run.last
    epoch = last.get("epoch", 0) / max(last["step"], 1) * run.step
    title = f"{run.manifest.get('stage', 'run')} · {run.folder.name}"
    how = "finished" if run.step >= last.get("steps", run.step) else "not finished"
    body = (
        f'<h1>{escape(title)}</h1><p class="dim">{run.step:,} of {last.get("steps", 0):,} steps, {how}, epoch '
        f"{epoch:.2f}; <code>{escape(str(run.folder))}</code></p>"
        f"{_figures(run)}{_damaged(run)}{_warnings(run)}{_recalled(run)}{_evaluations(run)}{_curves(run)}{_forecast(run)}{_manifest(run)}"
    )
    return page(f"{title} — report", body, "plot", "run_report")


def _figures(run: RunRecords) -> str:
    last = run.last
    recent = [record["loss"] for record in run.metrics[-RECENT:] if record["step"] >= 0.9 * last["step"]]
    label = f"mean loss of the last {len(recent)} logged steps" if len(recent) > 1 else "loss of the last logged step"
    numbers = {
        label: f"{statistics.fmean(recent):.4f}",
        "token accuracy on answers": f"{last.get('token_accuracy', 0):.1%}",
        "training time": duration(last["seconds"]),
        "samples per second": f"{last['samples'] / max(last['seconds'], 1e-9):,.1f}",
    }
    if run.validations:
        best = min(run.validations, key=lambda result: result["loss"])
        numbers[f"best validation loss, at step {best['step']:,}"] = f"{best['loss']:.4f}"
    return figures(numbers)


def _damaged(run: RunRecords) -> str:
    if not run.damaged:
        return ""
    lines = "".join(f'<li class="warn">{escape(trouble)}</li>' for trouble in run.damaged[:SHOWN])
    count = plural(len(run.damaged), "record")
    return f"<section><h2>Damaged records</h2><p>{count} could not be read:</p><ul>{lines}</ul></section>"


def _warnings(run: RunRecords) -> str:
    if not run.warnings:
        return '<section><h2>Warnings</h2><p class="dim">none</p></section>'
    lines = "".join(f'<li class="warn">step {step:,}: {escape(line)}</li>' for step, line in run.warnings)
    return f"<section><h2>Warnings</h2><ul>{lines}</ul></section>"


def _recalled(run: RunRecords) -> str:
    """Accuracy on the run's own rows, and on earlier training rows before and after; shown if the run measured it."""
    if not run.manifest.get("config", {}).get("recall_rows"):
        return ""
    names = {
        "own": "rows of this run, after",
        "before": "earlier training rows, before",
        "after": "the same rows, after",
    }
    rows = "".join(
        f"<tr><td>{name}</td><td>{recall['rows']} of {escape(recall['data'])}</td>"
        f"<td>{recall['token_accuracy']:.1%}</td><td>{recall['loss']:.4f}</td></tr>"
        for when, name in names.items()
        if (recall := run.recalled.get(when))
    )
    note = "" if "after" in run.recalled else "<p>How much the model has forgotten was not measured.</p>"
    head = "<tr><th></th><th>rows</th><th>token accuracy</th><th>loss</th></tr>"
    table = f'<div class="wide"><table>{head}{rows}</table></div>' if rows else ""
    return f"<section><h2>Learnt and kept</h2>{table}{note}</section>"


def _evaluations(run: RunRecords) -> str:
    """What the images add, over the steps."""
    return "".join(image_gains(f"Does it look? {title}", scores) for title, scores in run.evaluations.items())


def image_gains(heading: str, scores: list[dict[str, Any]]) -> str:
    """A section with the metric with and without images, and the gain, over the steps of a run's evaluations."""
    gains = [score["visual_gain"]["blank"] | {"step": score["step"]} for score in scores]
    metric = escape(scores[0]["metric"])
    with_image = curves(
        {"with its image": _points(scores, "value"), "with a blank image": _points(scores, "blank")},
        {"with its image": _band(scores)},
    )
    gain = curves({"gain": _points(gains, "value")}, {"gain": _band(gains)})
    return (
        f"<section><h2>{escape(heading)}</h2><p>{_first_gain(gains)}</p>"
        f'<div class="cols"><div><h3>{metric}</h3>{with_image}</div>'
        f"<div><h3>Gain by the image, in {metric}</h3>{gain}</div></div>"
        f'<p class="dim">Shaded: 95 % intervals over images. Where that of the gain contains 0, the data do not '
        f"show that the model uses its images.</p></section>"
    )


def _first_gain(gains: list[dict[str, Any]]) -> str:
    """From which step on all intervals of the gain are above 0."""
    shows = [gain["ci_low"] is not None and gain["ci_low"] > 0 for gain in gains]
    since = next((n for n in range(len(gains)) if all(shows[n:])), None)
    if since is None:
        return "These evaluations do not show that the model uses its images."
    begins = "From the first evaluation on" if not since else "From this step on"
    return f"{begins} the model uses its images: <b>step {gains[since]['step']:,}</b>."


def _band(figures: list[dict[str, Any]]) -> Band:
    """The intervals of figures that have one."""
    ends = [(figure["step"], figure["ci_low"], figure["ci_high"]) for figure in figures]
    return [(step, low, high) for step, low, high in ends if low is not None and high is not None]


def _curves(run: RunRecords) -> str:
    training, validation = run.metrics, run.validations
    loss = {"training": _points(training, "loss"), "validation": _points(validation, "loss")}
    if any(result.get("swapped_loss") is not None for result in validation):
        loss["validation, with images of other rows"] = _points(validation, "swapped_loss")
    others = {
        "Token accuracy": {
            "training": _points(training, "token_accuracy"),
            "validation": _points(validation, "token_accuracy"),
        },
        "Learning rate": {"lr": _points(training, "lr")},
        "Gradient norm before clipping": {"norm": _points(training, "grad_norm")},
        "Samples per second": {"samples": _rates(training, "samples")},
        "Tokens per second": {"tokens": _rates(training, "tokens")},
        "Share of time spent waiting for data": {"share": _rates(training, "data_seconds")},
    }
    small = "".join(f"<div><h3>{title}</h3>{curves(series)}</div>" for title, series in others.items())
    return f'<section><h2>Loss</h2>{curves(loss)}<div class="cols">{small}</div></section>'


def _forecast(run: RunRecords) -> str:
    """The forecast beside the actual values."""
    if not run.forecast:
        return ""
    rows = "".join(
        f"<tr><td>{LABELS[name]}</td><td>{shown(name, forecast)}</td><td>{shown(name, actual)}</td>"
        f"<td>{f'{actual / forecast:.2f}×' if actual and forecast else '–'}</td></tr>"
        for name, forecast, actual in beside(run)
    )
    planned, config = run.forecast.get("config", {}), run.manifest.get("config", {})
    other = [key for key in planned if planned[key] != config.get(key)]
    note = f'<p class="warn">The forecast had other settings: {escape(", ".join(other))}.</p>' if other else ""
    if run.step < run.last.get("steps", 0):
        note += (
            '<p class="dim">The run is not finished: the actual values are those until its last logged step, '
            f"{run.last['step']:,}.</p>"
        )
    return (
        '<section><h2>Forecast and actual</h2><div class="wide"><table><tr><th></th><th>forecast</th>'
        f"<th>actual</th><th>ratio</th></tr>{rows}</table></div>"
        f'{note}<p class="dim">{escape(str(run.forecast.get("how", "")))}</p></section>'
    )


def beside(run: RunRecords) -> list[tuple[str, float | None, float | None]]:
    """Name, forecast and actual value of each figure of the forecast."""
    last, forecast = run.last, run.forecast
    memory = max((event["memory_bytes"] for event in run.events if "memory_bytes" in event), default=None)
    price = forecast.get("price_per_hour")
    times: list[Any] = [object_in(event, "evaluation").get("seconds") for event in run.events]
    evaluating: float = sum(filter(is_number, times))
    seconds = last["seconds"] + evaluating
    actual: dict[str, float | None] = {
        "updates": last["step"],
        "samples": last["samples"],
        "tokens": last.get("tokens"),
        "supervised_tokens": last.get("supervised_tokens"),
        "seconds": seconds,
        "evaluation_seconds": evaluating,
        "memory_bytes": memory,
        "disk_bytes": disk_used(run.folder),
        "cost": price * seconds / 3600 if price else None,
    }
    return [(name, forecast[name], value) for name, value in actual.items() if forecast.get(name) is not None]


def disk_used(folder: Path) -> int:
    """Bytes of the weights, states and records of the run in `folder`."""
    weights = [folder.with_name(folder.name + ending) for ending in (".pth", ".json", "_best.pth", "_best.json")]
    return sum(file.stat().st_size for file in [*folder.rglob("*"), *weights] if file.is_file())


def _manifest(run: RunRecords) -> str:
    manifest = run.manifest
    if not manifest:
        return ""
    flat = flatten(manifest.get("config", {}))
    starts = [
        {"time": start.get("time"), "after step": start.get("after_updates"), "command": start.get("command")}
        | {"commit": object_in(start, "git").get("commit"), "machine": object_in(start, "machine").get("platform")}
        for start in manifest.get("starts", [])
        if isinstance(start, dict)
    ]
    return (
        f"<section><h2>Starts</h2>{''.join(map(_table, starts))}</section>"
        f"<section><h2>Inputs and versions</h2>"
        f"{_table(manifest.get('fingerprints', {}))}{_table(manifest.get('versions', {}))}</section>"
        f"<section><h2>Configuration</h2>{_table(flat)}</section>"
    )


def _table(rows: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{escape(str(key))}</td><td><code>{escape('–' if value is None else str(value))}</code></td></tr>"
        for key, value in rows.items()
    )
    return f'<div class="wide"><table class="words">{cells}</table></div><p></p>'


def _points(records: list[dict[str, Any]], key: str) -> Points:
    return [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]


def _rates(records: list[dict[str, Any]], key: str) -> Points:
    """Increase per second of a running total, between two records."""
    return [
        (later["step"], (later[key] - earlier[key]) / (later["seconds"] - earlier["seconds"]))
        for earlier, later in pairwise(records)
        if key in later and key in earlier and later["seconds"] > earlier["seconds"]
    ]


def shown(name: str, value: float | None) -> str:
    """A figure of a forecast or of a run, as text."""
    if value is None:
        return "–"
    if name.endswith("seconds"):
        return duration(value)
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB"
    return f"{value:,.2f}" if name == "cost" else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`42 s`, `5 min 3 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
