"""The page of `mmv compare --html`: differences with their intervals, and the questions whose score changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minimind_v.core.evaluate.compare import direction
from minimind_v.core.pages.eval_report import cards, charts, reading, safe, section
from minimind_v.core.pages.frame import page
from minimind_v.core.pages.plot import number
from minimind_v.core.wording import answer_text, chance, plural

CARDS = 12  # of a sheet


def compare_page(report: Mapping[str, Any], thumbnails: Mapping[str, Sequence[bytes]]) -> str:
    """The page of a report by `compare`; `thumbnails` are those of either side."""
    sides = "".join(
        f"<li><b>{name}</b>: {', '.join(f'<code>{safe(path)}</code>' for path in report[key])}</li>"
        for name, key in (("A", "first"), ("B", "second"))
    )
    unpaired = f"; {report['unpaired']:,} without a pair are left out" if report["unpaired"] else ""
    changed = report["changed"]
    higher = [entry for entry in changed if entry["score_second"] > entry["score_first"]]
    lower = [entry for entry in changed if entry["score_second"] < entry["score_first"]]
    heads = ("Worse", "Better") if report["lower_is_better"] else ("Higher score", "Lower score")
    body = (
        f"<h1>Is B better than A?</h1><ul>{sides}</ul><p class='dim'>{plural(report['rows'], 'question')} in both"
        f"{unpaired}. {plural(len(changed), 'question')} changed the score.</p>{_differences(report)}{_seeds(report)}"
        f"{_sheet(f'{heads[0]} in B', higher, thumbnails)}{_sheet(f'{heads[1]} in B', lower, thumbnails)}"
    )
    return page("A and B — comparison", body, "plot", "eval_report")


def _differences(report: Mapping[str, Any]) -> str:
    drawn = charts(report["metrics"], "difference")
    verdicts = "".join(f"<li>{_verdict(metric, report['lower_is_better'])}</li>" for metric in report["metrics"])
    return section("B − A", f"{drawn}<ul>{verdicts}</ul>{reading('A dot is the difference, its line')}")


def _verdict(metric: Mapping[str, Any], lower_is_better: bool) -> str:
    name = f"<b>{safe(metric['name'])}</b>"
    if metric["difference"] is None:
        return f"{name}: no such answers on one of the sides."
    if metric["ci_low"] is None:
        return f"{name}: no interval (a single image, or nothing varies), so nothing is shown."
    rows = metric["rows_to_see_half"]
    power = "" if rows is None else f" Some {plural(rows, 'question')} would show half of it in 80 of 100 cases."
    shown = direction(metric, lower_is_better)
    verdict = f"<b>{shown}</b>" if shown else "the interval contains 0. These data <b>do not show</b> a difference"
    return f"{name}: {verdict} ({chance(metric['p'])}).{power}"


def _seeds(report: Mapping[str, Any]) -> str:
    """The values of the seeds of each side."""
    if not report.get("seeds"):
        return ""
    rows = "".join(
        f"<tr><td>{safe(own['name'])}</td>"
        + "".join(f"<td>{', '.join(map(number, own[side]))}</td><td>{_spread(own['deviations'][at])}</td>"
                  for at, side in enumerate(("first", "second")))
        + "</tr>"
        for own in report["seeds"]
    )  # fmt: skip
    return section(
        "Between seeds",
        f'<div class="wide"><table><tr><th></th><th>A</th><th>±</th><th>B</th><th>±</th></tr>{rows}</table></div>'
        "<p>The intervals above contain this spread: ± is the standard deviation between the seeds of a side.</p>",
    )


def _spread(deviation: float | None) -> str:
    return "one seed" if deviation is None else number(deviation)


def _sheet(head: str, entries: Sequence[Mapping[str, Any]], thumbnails: Mapping[str, Sequence[bytes]]) -> str:
    if not entries:
        return ""
    shown = (
        {**entry, "answers": [(name, _answer(entry, key), f"score {number(entry[f'score_{key}'])}")
                              for name, key in (("A", "first"), ("B", "second"))]}
        for entry in entries[:CARDS]
    )  # fmt: skip
    note = f"{plural(len(entries), 'question')}; the largest changes."
    return section(head, f'<p class="dim">{note}</p>{cards(shown, thumbnails)}')


def _answer(entry: Mapping[str, Any], side: str) -> str:
    """The answer of a side; nothing where neither has one, as of a loss."""
    return answer_text(entry[side]) if entry["first"] or entry["second"] else ""
