"""`report.html`: a run on one page, drawn from what it has left in its folder."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from minimind_v.core.errors import DataError, MissingInput
from minimind_v.core.files import object_in
from minimind_v.core.monitor.metrics import read_lines, read_metrics
from minimind_v.core.monitor.records import REPORTED, read_part
from minimind_v.core.pages.frame import figures, page, write_page
from minimind_v.core.pages.plot import STYLE as PLOT_STYLE
from minimind_v.core.pages.plot import Points, curves
from minimind_v.core.wording import plural

STYLE = """
.cols { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 0 1.5rem }
h3 { font-size: .95rem; margin: 1rem 0 .2rem } li { margin: .3rem 0 }
td { vertical-align: top } table.words td { text-align: left; white-space: normal }
"""
SHOWN = 5  # damaged records that are named one by one
FIGURES = ("updates", "samples", "tokens", "supervised_tokens", "seconds", "memory_bytes", "disk_bytes", "cost")
MANIFEST: dict[str, type] = {"stage": str, "config": dict, "fingerprints": dict, "versions": dict, "starts": list}
FORECAST: dict[str, type] = dict.fromkeys((*FIGURES, "price_per_hour"), float) | {"config": dict, "how": str}


@dataclass(frozen=True)
class Left:
    """What a run has left in its folder; empty where it has not."""

    folder: Path
    metrics: list[dict[str, Any]]  # of logged updates
    events: list[dict[str, Any]]
    manifest: dict[str, Any]
    forecast: dict[str, Any]
    damaged: list[str]  # `file:line: what is wrong` of each record that cannot be read

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [event["validation"] for event in self.events if "validation" in event]

    @property
    def warnings(self) -> list[tuple[int, str]]:
        return [(event["step"], event["warning"]) for event in self.events if "warning" in event]

    @property
    def recalled(self) -> dict[str, dict[str, Any]]:
        """What was measured of rows without learning from them: the run's `own`; earlier ones, `before`, `after`."""
        return {when: found for event in self.events for when, found in event.get("recalled", {}).items()}

    @property
    def last(self) -> dict[str, Any]:
        return self.metrics[-1]


def find_run(path: Path) -> Path:
    """The folder of a run, named by itself, by its weights, or by an --out with one run. Raises MissingInput."""
    path = path.resolve() if path.name in ("", "..") else path
    stem = path.with_suffix("") if path.name else path  # the root has no name
    of_best = stem.with_name(stem.name.removesuffix("_best")) if stem.name.removesuffix("_best") else stem
    for folder in (path, stem, of_best, *([path.parent] if path.is_file() else [])):
        if (folder / "metrics.jsonl").is_file():
            return folder
    found = sorted(path.glob("*/metrics.jsonl"))
    if len(found) == 1:
        return found[0].parent
    several = ", ".join(str(file.parent) for file in found)
    raise MissingInput(
        f"{path} holds several runs: name one of {several}" if found else
        f"no run in {path}: there is no metrics.jsonl — name the folder that `mmv train` said the curve is in"
    )  # fmt: skip


def read_run(folder: Path) -> Left:
    """All that a run has left, of one that is under way too. Raises MissingInput or DataError."""
    damaged: list[str] = []
    metrics = read_metrics(folder / "metrics.jsonl", damaged.append, REPORTED)
    events = list(read_lines(folder / "events.jsonl", damaged.append))
    manifest = read_part(folder / "manifest.json", MANIFEST, damaged.append)
    forecast = read_part(folder / "forecast.json", FORECAST, damaged.append)
    return Left(folder, metrics, events, manifest, forecast, damaged)


def write_report(folder: Path, warn: Callable[[str], object] = lambda _: None) -> Path:
    """Write the page beside what it shows; `warn` is told what is damaged. Raises MissingInput, DataError, RunError."""
    path, run = folder / "report.html", read_run(folder)
    try:
        text = report_page(run)
    except RecursionError:
        raise DataError(f"{folder / 'manifest.json'}: nested too deep to be shown — remove it") from None
    write_page(path, text)
    for trouble in run.damaged[:SHOWN]:
        warn(f"{trouble}; left out of the report")
    if len(run.damaged) > SHOWN:
        warn(f"{folder}: {len(run.damaged) - SHOWN:,} more damaged records are left out of the report")
    return path


def report_page(run: Left) -> str:
    """The page."""
    last = run.last
    ended = last["step"] >= last.get("steps", last["step"])
    title = f"{run.manifest.get('stage', 'run')} · {run.folder.name}"
    how = "to its end" if ended else "so far"
    body = (
        f'<h1>{escape(title)}</h1><p class="dim">{last["step"]:,} of {last.get("steps", 0):,} updates {how}, epoch '
        f"{last.get('epoch', 0):.2f}; <code>{escape(str(run.folder))}</code></p>"
        f"{_figures(run)}{_damaged(run)}{_warnings(run)}{_recalled(run)}{_curves(run)}{_forecast(run)}{_manifest(run)}"
    )
    return page(f"{title} — report", body, PLOT_STYLE + STYLE)


def _figures(run: Left) -> str:
    last = run.last
    told = {
        "loss, mean of the last logged updates": f"{statistics.fmean(one['loss'] for one in run.metrics[-10:]):.4f}",
        "of the answers' tokens are right": f"{last.get('token_accuracy', 0):.1%}",
        "of training": duration(last["seconds"]),
        "samples per second": f"{last['samples'] / max(last['seconds'], 1e-9):,.1f}",
    }
    if run.validations:
        best = min(run.validations, key=lambda one: one["loss"])
        told[f"best validation loss, at update {best['step']:,}"] = f"{best['loss']:.4f}"
    return figures(told)


def _damaged(run: Left) -> str:
    if not run.damaged:
        return ""
    lines = "".join(f'<li class="warn">{escape(trouble)}</li>' for trouble in run.damaged[:SHOWN])
    count = plural(len(run.damaged), "record")
    return f"<section><h2>Damaged</h2><p>{count} cannot be read and are left out:</p><ul>{lines}</ul></section>"


def _warnings(run: Left) -> str:
    if not run.warnings:
        return '<section><h2>Warnings</h2><p class="dim">none: nothing looked wrong</p></section>'
    told = "".join(f'<li class="warn">update {step:,}: {escape(line)}</li>' for step, line in run.warnings)
    return f"<section><h2>Warnings</h2><ul>{told}</ul></section>"


def _recalled(run: Left) -> str:
    """What the run knows of its own rows, and what became of what its weights knew before; told where it was asked."""
    if not run.manifest.get("config", {}).get("recall_rows"):
        return ""
    names = {"own": "its own rows, now", "before": "rows learnt before, at the start", "after": "the same, now"}
    rows = "".join(
        f"<tr><td>{name}</td><td>{found['rows']} of {escape(found['data'])}</td><td>{found['token_accuracy']:.1%}</td>"
        f"<td>{found['loss']:.4f}</td></tr>"
        for when, name in names.items()
        if (found := run.recalled.get(when))
    )
    note = (
        ""
        if "after" in run.recalled
        else "<p>What the weights knew before and may have forgotten was not measured.</p>"
    )
    head = "<tr><th></th><th>rows</th><th>answers' tokens right</th><th>loss</th></tr>"
    return f"<section><h2>Learnt and kept</h2>{f'<table>{head}{rows}</table>' if rows else ''}{note}</section>"


def _curves(run: Left) -> str:
    seen, held = run.metrics, run.validations
    loss = {"training": _points(seen, "loss"), "validation": _points(held, "loss")}
    if any(one.get("swapped_loss") is not None for one in held):
        loss["validation, pictures of other rows"] = _points(held, "swapped_loss")
    others = {
        "Answer tokens right": {
            "training": _points(seen, "token_accuracy"),
            "validation": _points(held, "token_accuracy"),
        },
        "Learning rate": {"lr": _points(seen, "lr")},
        "Gradient norm before clipping": {"norm": _points(seen, "grad_norm")},
        "Samples per second": {"samples": _rates(seen, "samples")},
        "Tokens per second": {"tokens": _rates(seen, "tokens")},
        "Share of time waiting for data": {"share": _rates(seen, "data_seconds")},
    }
    small = "".join(f"<div><h3>{title}</h3>{curves(series)}</div>" for title, series in others.items())
    return f'<section><h2>Loss</h2>{curves(loss)}<div class="cols">{small}</div></section>'


def _forecast(run: Left) -> str:
    """What was foretold beside what happened."""
    if not run.forecast:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{shown(name, foretold)}</td><td>{shown(name, happened)}</td>"
        f"<td>{f'{happened / foretold:.2f}×' if happened and foretold else '–'}</td></tr>"
        for name, foretold, happened in beside(run)
    )
    planned, config = run.forecast.get("config", {}), run.manifest.get("config", {})
    other = [key for key in planned if planned[key] != config.get(key)]
    note = f'<p class="warn">The plan was for other settings: {escape(", ".join(other))}.</p>' if other else ""
    if run.last["step"] < run.last.get("steps", 0):
        note += '<p class="dim">The run is not at its end: what happened is until now.</p>'
    return (
        '<section><h2>Forecast and what happened</h2><div class="wide"><table><tr><th></th><th>mmv train plan</th>'
        f"<th>the run</th><th></th></tr>{rows}</table></div>"
        f'{note}<p class="dim">{escape(str(run.forecast.get("how", "")))}</p></section>'
    )


def beside(run: Left) -> list[tuple[str, float | None, float | None]]:
    """Name, forecast and what happened, for all that a plan foretells."""
    last, told = run.last, run.forecast
    memory = max((event["memory_bytes"] for event in run.events if "memory_bytes" in event), default=None)
    price = told.get("price_per_hour")
    happened: dict[str, float | None] = {
        "updates": last["step"],
        "samples": last["samples"],
        "tokens": last.get("tokens"),
        "supervised_tokens": last.get("supervised_tokens"),
        "seconds": last["seconds"],
        "memory_bytes": memory,
        "disk_bytes": disk_used(run.folder),
        "cost": price * last["seconds"] / 3600 if price else None,
    }
    return [(name, told[name], value) for name, value in happened.items() if told.get(name) is not None]


def disk_used(folder: Path) -> int:
    """Bytes of the weights, the states and the records of a run, whose folder this is."""
    weights = [folder.with_name(folder.name + ending) for ending in (".pth", ".json", "_best.pth", "_best.json")]
    return sum(file.stat().st_size for file in [*folder.rglob("*"), *weights] if file.is_file())


def _manifest(run: Left) -> str:
    found = run.manifest
    if not found:
        return ""
    flat = dict(_flat(found.get("config", {})))
    starts = [
        {"time": start.get("time"), "after update": start.get("after_updates"), "command": start.get("command")}
        | {"commit": object_in(start, "git").get("commit"), "machine": object_in(start, "machine").get("platform")}
        for start in found.get("starts", [])
        if isinstance(start, dict)
    ]
    return (
        f"<section><h2>Starts</h2>{''.join(map(_table, starts))}</section>"
        f"<section><h2>What it was made of</h2>"
        f"{_table(found.get('fingerprints', {}))}{_table(found.get('versions', {}))}</section>"
        f"<section><h2>Configuration</h2>{_table(flat)}</section>"
    )


def _table(rows: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{escape(str(key))}</td><td><code>{escape('–' if value is None else str(value))}</code></td></tr>"
        for key, value in rows.items()
    )
    return f'<div class="wide"><table class="words">{cells}</table></div><p></p>'


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _points(records: list[dict[str, Any]], key: str) -> Points:
    return [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]


def _rates(records: list[dict[str, Any]], key: str) -> Points:
    """How much of what adds up came per second between two records."""
    return [
        (later["step"], (later[key] - earlier[key]) / (later["seconds"] - earlier["seconds"]))
        for earlier, later in pairwise(records)
        if key in later and key in earlier and later["seconds"] > earlier["seconds"]
    ]


def shown(name: str, value: float | None) -> str:
    """A figure of a forecast or of a run, in words."""
    if value is None:
        return "–"
    if name == "seconds":
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
