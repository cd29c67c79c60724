"""The page of `mmv data stats`."""

from __future__ import annotations

from html import escape
from typing import Any

from minimind_v.core.inspect.lines import summary, table_of_quantiles
from minimind_v.core.inspect.page import figures, page
from minimind_v.core.inspect.tokens import visible

STYLE = """
.plot { width: 100%; height: auto; min-width: 34rem } .plot rect { fill: #35a35c } .plot rect.over { fill: #d9685d }
.plot line { stroke: var(--line) } .plot .limit { stroke: #d9685d; stroke-dasharray: 5 4 } td b { font-weight: 600 }
.share { display: flex; height: 1.1rem; border-radius: .4rem; overflow: hidden; max-width: 44rem;
  background: var(--chip) }
.share i:nth-child(1) { background: #2457d6 } .share i:nth-child(2) { background: #35a35c }
.share i:nth-child(3) { background: #d98a2b } .share i:nth-child(4) { background: #8d8d8d } .share i { display: block }
dl { display: grid; grid-template-columns: auto 1fr; gap: .35rem 1.2rem; margin: 0 } dt { color: var(--dim) }
dd { margin: 0; overflow-wrap: anywhere }
"""


def stats_page(report: dict[str, Any]) -> str:
    """A report of `stats.look_at` as a page."""
    name = escape(visible(str(report["file"])))
    told = f"a sample of {report['looked_at']:,} rows, the first of the first epoch" if report["sample"] else "all rows"
    numbers = {
        "rows": f"{report['rows']:,}",
        "tokens, half of the rows have more": f"{report['tokens']['total']['p50']:,}",
        f"of the rows are cut at {report['max_length']} tokens": f"{report['cut']['share']:.1%}",
        "of the rows are skipped": f"{report['skipped']['share']:.1%}",
        "padding in training's batches": f"{report['padding']['batches']:.1%}",
        "updates": f"{report['training']['updates']:,}",
    }
    tables = table_of_quantiles(report)
    head = "".join(f"<th>{escape(title)}</th>" for title in ["", *next(iter(tables.values()))])
    rows = "".join(
        f"<tr><td>{escape(what)}</td>{''.join(f'<td>{value:,}</td>' for value in row.values())}</tr>"
        for what, row in tables.items()
    )
    shares = "".join(f'<i style="width:{share:.2%}"></i>' for share in report["languages"].values())
    words = "".join(f"<dt>{escape(key)}</dt><dd>{escape(visible(text))}</dd>" for key, text in summary(report).items())
    body = (
        f'<h1>What these rows are like</h1><p class="dim"><code>{name}</code>, read as <b>{report["stage"]}</b> would '
        f"read it; {told}.</p>{figures(numbers)}"
        f"<section><h2>Tokens per row, before truncation</h2>"
        f'<div class="wide">{_plot(report["histogram"], report["max_length"])}</div></section>'
        f'<section><h2>Quantiles</h2><div class="wide"><table><tr>{head}</tr>{rows}</table></div></section>'
        f'<section><h2>What a run would make of it</h2><div class="share">{shares}</div>'
        f"<p></p><dl>{words}</dl></section>"
    )
    return page(f"{report['file']} — stats", body, STYLE)


def _plot(found: dict[str, list[int]], max_length: int) -> str:
    """Bars; those that are longer than training takes in red."""
    edges, counts = found["edges"], found["counts"]
    width, height, foot = 800, 240, 26
    most, step = max(counts), width / len(counts)
    bars, labels = [], []
    for number, rows in enumerate(counts):
        tall = (height - foot - 22) * rows / most
        kind = ' class="over"' if edges[number] >= max_length else ""
        x, y = number * step, height - foot - tall
        bars.append(f'<rect{kind} x="{x + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" rx="2"/>')
        labels.append(
            f'<text x="{x + step / 2:.1f}" y="{y - 5:.1f}" text-anchor="middle">{rows:,}</text>' if rows else ""
        )
        if number % max(1, len(counts) // 10) == 0:
            labels.append(f'<text x="{x:.1f}" y="{height - 8}">{edges[number]:,}</text>')
    at = (max_length - edges[0]) / (edges[-1] - edges[0]) * width
    limit = f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height - foot}"/>' if 0 < at < width else ""
    floor = f'<line x1="0" x2="{width}" y1="{height - foot}" y2="{height - foot}"/>'
    return f'<svg class="plot" viewBox="0 0 {width} {height}">{floor}{"".join(bars)}{"".join(labels)}{limit}</svg>'
