"""The page of `mmv data stats`."""

from __future__ import annotations

from html import escape
from typing import Any

from minimind_v.core.curate.summary import quantile_table, summary
from minimind_v.core.curate.token_text import visible
from minimind_v.core.pages.frame import figures, page
from minimind_v.core.pages.plot import COLOURS, HEIGHT, WIDTH, axis, chart, legend

LABELS = 6  # below the histogram at most, without the first


def stats_page(report: dict[str, Any]) -> str:
    """The page of a report that `mmv data stats` computes."""
    name = escape(visible(str(report["file"])))
    rows_read = f"the first {report['looked_at']:,} rows of the first epoch" if report["sample"] else "all rows"
    numbers = {
        "rows": f"{report['rows']:,}",
        "tokens per row (median)": f"{report['tokens']['total']['p50']:,}",
        f"of the rows are cut at {report['max_length']} tokens": f"{report['cut']['share']:.1%}",
        "of the rows are skipped": f"{report['skipped']['share']:.1%}",
        "padding in training's batches": f"{report['padding']['batches']:.1%}",
        "steps": f"{report['training']['updates']:,}",
    }
    tables = quantile_table(report)
    head = "".join(f"<th>{escape(title)}</th>" for title in ["", *next(iter(tables.values()))])
    rows = "".join(
        f"<tr><td>{escape(what)}</td>{''.join(f'<td>{value:,}</td>' for value in row.values())}</tr>"
        for what, row in tables.items()
    )
    languages = list(zip(COLOURS, report["languages"].items(), strict=False))
    shares = "".join(f'<i style="width:{share:.2%};background:{colour}"></i>' for colour, (_, share) in languages)
    key = legend((colour, f"{name} {share:.1%}") for colour, (name, share) in languages)
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(visible(text))}</dd>" for key, text in summary(report).items())
    body = (
        f'<h1>Statistics of the rows</h1><p class="dim"><code>{name}</code>, read as <b>{report["stage"]}</b> data; '
        f"{rows_read}.</p>{figures(numbers)}"
        f"<section><h2>Tokens per row, before truncation</h2>"
        f"{_plot(report['histogram'], report['max_length'])}</section>"
        f'<section><h2>Quantiles</h2><div class="wide"><table><tr>{head}</tr>{rows}</table></div></section>'
        f'<section><h2>In training</h2><div class="share">{shares}</div>{key}'
        f"<p></p><dl>{facts}</dl></section>"
    )
    return page(f"{report['file']} — stats", body, "plot", "stats")


def _plot(histogram: dict[str, list[int]], max_length: int) -> str:
    """The histogram of row lengths; rows longer than `max_length` are red."""
    edges, counts = histogram["edges"], histogram["counts"]
    ticks = axis(0, max(counts))
    step = WIDTH / len(counts)
    bars = []
    for number, rows in enumerate(counts):
        kind = ' class="over"' if edges[number] >= max_length else ""
        tall = HEIGHT * rows / ticks[-1]
        name = f"<title>{edges[number]:,} to {edges[number + 1] - 1:,} tokens: {rows:,} rows</title>"
        x, y = number * step + step * 0.03, HEIGHT - tall
        bars.append(f'<rect{kind} x="{x:.2f}" y="{y:.2f}" width="{step * 0.94:.2f}" height="{tall:.2f}">{name}</rect>')
    at = (max_length - edges[0]) / (edges[-1] - edges[0]) * WIDTH
    if 0 < at < WIDTH:
        bars.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{HEIGHT}"/>')
    every = -(-len(counts) // LABELS)
    labels = [(number / len(counts), f"{edges[number]:,}") for number in range(0, len(edges), every)]
    key = {"var(--whole)": "not cut", "var(--over)": f"longer than the {max_length:,} tokens of training"}
    return chart("".join(bars), ticks, labels) + (legend(key.items()) if edges[-1] > max_length else "")
