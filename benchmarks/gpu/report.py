"""What was found as Markdown: predicted beside measured, and the card's name on every table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimind_v.core.errors import RunError
from minimind_v.core.files import write_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
# Written down before the first run on a card: arithmetic for an H100 (989 TFLOP/s nominal), by part and line.
PREDICTED = {
    "waits": {"small pretrain": "7 waits, 560 kernels", "small sft": "7 waits, 690 kernels", "moe sft": "7, 1,600"},
    "training": {
        "small pretrain, pictures encoded": "1.5–1.8 K",
        "small pretrain, encoded and stored": "0.9–1.0 K",
        "small pretrain, features read": "2.0–2.7 K",
        "small sft, pictures encoded": "0.3 K",
        "small sft, encoded and stored": "0.2–0.3 K",
        "small sft, features read": "0.4–0.5 K",
    },
    "vision": {
        "pretrain, groups of 64, graph": "12 K images", "small pretrain, pictures encoded, at their step": "1.5–1.8 K",
        "small sft, pictures encoded, at their step": "0.3 K",
    },
    "steps": {
        "small pretrain, padded": "10–20 % less", "small pretrain, graph": "2.3 times as fast as eager",
        "small sft, padded": "10–20 % less", "small sft, graph": "3.5–4 times as fast as eager",
    },
    "resident": {
        "pretrain, eager": "6–8 ms of the host", "pretrain, graph": "3.0 ms",
        "sft, eager": "8–10 ms of the host", "sft, graph": "2.4 ms",
    },
    "resident, compiled": {"pretrain, both": "1.9 ms", "sft, both": "1.8 ms"},
    "talking": {
        "1 streams, sampled, graph": "4–5 K", "8 streams, sampled, graph": "25–30 K",
        "64 streams, sampled, graph": "120–200 K",
    },
    "plans": {"cuDNN": "23–440 ms for a plan", "flash": "none"},
}  # fmt: skip
HIDDEN = {"losses", "rows", "checks", "longest", "schedule", "features", "where", "traceback", "kernels_of_a_run"}

NOTES = "<!-- written by hand from here on -->"


def markdown(report: dict[str, Any]) -> str:
    """The whole report as a page."""
    card, parts = report["card"], report["parts"]
    lines = [
        "# On a GPU",
        "",
        f"Measured by `make gpu` on **{card}**, {report['date']}, torch {report['torch']}, in "
        f"{report['seconds']:.0f} s. Predictions were written down before the first run, as arithmetic for an H100. "
        "A ratio is printed only where the losses of both sides agree; every figure is of this card alone. "
        "What is newer than this run is named under *not measured yet* in the notes at the end.",
        "",
    ]
    failed = [f"{part}: {name}" for part, result in parts.items() for name, right in _checks(result) if not right]
    troubled = [f"{part}: {result['status']}" for part, result in parts.items() if result["status"] != "done"]
    right = sum(1 for result in parts.values() for _, passed in _checks(result) if passed)
    lines += [f"{right} checks passed, {len(failed)} failed.", ""]
    if report.get("left_out"):
        lines += [f"Left out for time: {', '.join(report['left_out'])}.", ""]
    lines += [f"- **failed** {name}" for name in failed] + [f"- **not whole** {name}" for name in troubled]
    for part, result in parts.items():
        lines += ["", f"## {part} · {card}", "", *_table(part, result), ""]
        lines += [f"- {'✓' if passed else '✗'} {name}" for name, passed in _checks(result)]
    return "\n".join(lines).rstrip() + "\n"


def _checks(result: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """All checks of a part, those of its lines included."""
    yield from result.get("checks", {}).items()
    for value in result.values():
        if isinstance(value, dict):
            yield from value.get("checks", {}).items()


def failures(parts: dict[str, Any]) -> list[str]:
    """Checks that failed and parts that did not end well; what was skipped for want of time is none."""
    failed = [f"{part}: {name}" for part, result in parts.items() for name, passed in _checks(result) if not passed]
    return failed + [
        f"{part}: {result['status']}" for part, result in parts.items() if result["status"].startswith("failed")
    ]


def _table(part: str, result: dict[str, Any]) -> list[str]:
    predicted = PREDICTED.get(part, {})
    lines = [f"| | measured{' | predicted' if predicted else ''} |", f"|---|---|{'---|' if predicted else ''}"]
    for name, value in result.items():
        if name in ("status", "seconds", *HIDDEN):
            continue
        more = f" | {predicted.get(name, '')}" if predicted else ""
        lines.append(f"| {name} | {_shown(value)}{more} |")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        texts = [f"{name.replace('_', ' ')} {_shown(item)}" for name, item in value.items() if name not in HIDDEN]
        return ", ".join(texts)
    if isinstance(value, list):
        return "; ".join(_shown(item) if not isinstance(item, list) else " ".join(map(str, item)) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def write_page(reports: list[dict[str, Any]], path: Path = PAGE) -> None:
    """Write the page of one or more runs, but for what people have added below the line `NOTES`. Raises RunError."""
    old_page = path.read_text(encoding="utf-8") if path.exists() else ""
    notes = old_page[old_page.index(NOTES) :] if NOTES in old_page else ""
    write_text(path, markdown(together(reports)) + (f"\n{notes}" if notes else ""))


def together(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of the same code on one card as one report; of a part that two have, the first one's result.

    Raises RunError where a ratio of their figures would be one of two cards.
    """
    first, *others = reports
    for other in others:
        for key in ("card", "torch"):
            if other[key] != first[key]:
                raise RunError(f"these runs do not belong together: {key} is {first[key]}, and {other[key]}")
    parts = {name: part for report in reversed(reports) for name, part in report["parts"].items()}
    order = [name for report in reports for name in report["parts"]]
    return first | {
        "date": max(report["date"] for report in reports),
        "seconds": sum(report["seconds"] for report in reports),
        "left_out": [name for name in first["left_out"] if all(name in other["left_out"] for other in others)],
        "parts": {name: parts[name] for name in dict.fromkeys(order)},
    }
