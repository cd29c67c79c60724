"""A report of `stats.describe_rows` as named lines of text and a table of quantiles, for a terminal and a page."""

from __future__ import annotations

from typing import Any

from minimind_v.core.rows.row import describe_notes, describe_text_rows
from minimind_v.core.wording import plural


def summary(report: dict[str, Any]) -> dict[str, str]:
    """The figures of a report as text, by name, without the quantiles."""
    skipped, cut, training = report["skipped"], report["cut"], report["training"]
    kinds = ", ".join(f"{number} {kind}" for kind, number in skipped["kinds"].items())
    figures = {
        "languages": ", ".join(f"{name} {share:.1%}" for name, share in report["languages"].items()) + " (by script)",
        "skipped": f"{plural(skipped['rows'], 'row')} ({skipped['share']:.2%}){f': {kinds}' if kinds else ''}"
        + ("; training refuses this many" if skipped["refused"] else "")
        + "; image files were not opened (`mmv data check` opens them)",
        **({"text rows": describe_text_rows(report["text_rows"], report["looked_at"])} if report["text_rows"] else {}),
        **({"read as": "; ".join(notes)} if (notes := describe_notes(report["notes"], report["looked_at"])) else {}),
        "cut": f"{plural(cut['rows'], 'row')} ({cut['share']:.2%}) at {report['max_length']} tokens, "
        f"{plural(cut['turns'], 'turn')} and {plural(cut['answer_tokens'], 'answer token')} "
        f"({cut['answer_tokens_share']:.2%}) with them",
        "padding": f"{report['padding']['batches']:.2%} in training batches; "
        f"{report['padding']['fixed']:.1%} if every row were padded to {report['max_length']}",
        "steps": f"{training['updates']:,}: {plural(training['epochs'], 'epoch')} in batches of "
        f"{training['batch_size']}, {training['accumulate']} per step; "
        f"{plural(training['supervised_tokens'], 'supervised token')}",
    }
    seconds = report["time"]["seconds"]
    figures["time"] = f"{_duration(seconds)} — {report['time']['how']}" if seconds else report["time"]["how"]
    return figures


def _duration(seconds: float) -> str:
    for limit, unit, name in (
        (90, 1, "seconds"),
        (5400, 60, "minutes"),
        (172800, 3600, "hours"),
        (1e99, 86400, "days"),
    ):
        if seconds < limit:
            return f"about {seconds / unit:.{0 if seconds / unit >= 10 else 1}f} {name}"
    raise AssertionError(seconds)


def quantile_table(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The rows of the table of quantiles, by label."""
    tokens = {f"tokens, {name}" if name != "total" else "tokens": row for name, row in report["tokens"].items()}
    rows = {"turns": report["turns"], "images": report["images"]} | tokens
    return {what: {name: value for name, value in row.items() if name != "sum"} for what, row in rows.items()}
