"""Charts for the HTML pages: the shapes are SVG, stretched to the page; the labels are text, never scaled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from types import MappingProxyType

WIDTH, HEIGHT = 1000, 100  # of the drawing, before it is stretched
POINTS = 400  # of a curve at most; the mean of neighbours replaces them if there are more
COLOURS = ("var(--accent)", "#d9685d", "#35a35c", "#d98a2b")
GRID = 4  # steps of the vertical axis, at most

Points = list[tuple[float, float]]
Band = list[tuple[float, float, float]]


def curves(series: dict[str, Points], bands: Mapping[str, Band] = MappingProxyType({})) -> str:
    """Curves of (step, y) by name, without infinite values, on one axis from 0; a legend if there are several.

    `bands` has (step, low, high) of the intervals around a curve.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    shown = {name: thin(points) for name, points in finite.items() if points}
    if not shown:
        return '<p class="dim">no data</p>'
    ends = [(x, y) for name in shown for x, low, high in bands.get(name, ()) for y in (low, high)]
    xs, ys = zip(*(point for points in (*shown.values(), ends) for point in points), strict=True)
    x_low, x_high, ticks = min(xs), max(xs), axis(min(0.0, *ys), max(ys))

    def position(x: float, y: float) -> str:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return f"{across * WIDTH:.1f},{HEIGHT * (ticks[-1] - y) / (ticks[-1] - ticks[0]):.2f}"

    lines = []
    for colour, (name, points) in zip(COLOURS * len(shown), shown.items(), strict=False):
        if band := bands.get(name):
            around = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            corners = " ".join(position(*corner) for corner in around)
            lines.append(f'<polygon points="{corners}" style="fill:{colour}"/>')
        kind = ' class="point"' if len(points) == 1 else ""  # a line of length 0, with round ends
        positions = " ".join(position(*point) for point in points * (2 if len(points) == 1 else 1))
        lines.append(f'<polyline{kind} points="{positions}" style="stroke:{colour}"/>')
    labels = [(0.0, f"step {x_low:,.0f}"), (1.0, f"{x_high:,.0f}")] if x_high > x_low else [(0.5, f"step {x_low:,.0f}")]
    below = legend(zip(COLOURS * len(shown), shown, strict=False)) if len(shown) > 1 else ""
    return chart("".join(lines), ticks, labels) + below


def chart(shapes: str, ticks: list[float], labels: Iterable[tuple[float, str]]) -> str:
    """A chart: shapes of WIDTH × HEIGHT, the vertical axis, and labels below at their share of the width."""
    steps = len(ticks) - 1
    heights = (f"{HEIGHT * number / steps:.2f}" for number in range(len(ticks)))
    grid = "".join(f'<line x1="0" x2="{WIDTH}" y1="{y}" y2="{y}"/>' for y in heights)
    names = "".join(f"<span>{number(tick)}</span>" for tick in reversed(ticks))
    ends = {0.0: ' class="first"', 1.0: ' class="last"'}
    below = "".join(
        f'<span{ends.get(share, "")} style="left:{share:.2%}">{escape(text)}</span>' for share, text in labels
    )
    return (
        f'<div class="chart"><div class="y">{names}</div><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'preserveAspectRatio="none">{grid}{shapes}</svg><div class="x">{below}</div></div>'
    )


@dataclass(frozen=True)
class Interval:
    """A figure of a chart of intervals: its name, what stands behind it, and what is drawn; None is not."""

    name: str
    text: str
    value: float | None
    low: float | None = None
    high: float | None = None


def intervals(rows: Sequence[Interval], around: tuple[float, ...] = (0.0,)) -> str:
    """Figures with their intervals, one below the other on one axis, which also spans the values `around`."""
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    ticks = axis(min((*around, *ends)), max((*around, *ends)))

    def across(value: float) -> float:
        return (value - ticks[0]) / (ticks[-1] - ticks[0])

    def line(kind: str, first: float, last: float, heights: tuple[int, int]) -> str:
        x1, x2 = (f"{WIDTH * across(end):.1f}" for end in (first, last))
        return f'<line{kind} x1="{x1}" x2="{x2}" y1="{heights[0]}" y2="{heights[1]}"/>'

    grid = "".join(line(' class="zero"' * (abs(tick) < 1e-9), tick, tick, (0, HEIGHT)) for tick in ticks)
    middle, drawn = (HEIGHT // 2, HEIGHT // 2), []
    for row in rows:
        shapes = grid
        if row.low is not None and row.high is not None:
            shapes += line(' class="range"', row.low, row.high, middle)
        if row.value is not None:
            shapes += line(' class="point"', row.value, row.value, middle)
        svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{shapes}</svg>'
        drawn.append(f'<div class="row"><b dir="auto">{escape(row.name)}</b>{svg}<span>{escape(row.text)}</span></div>')
    labels = "".join(f'<span style="left:{across(tick):.2%}">{number(tick)}</span>' for tick in ticks)
    return f'<div class="intervals">{"".join(drawn)}<div class="row x"><div>{labels}</div></div></div>'


def legend(colours: Iterable[tuple[str, str]]) -> str:
    """The name of each colour."""
    names = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for colour, name in colours)
    return f'<div class="legend dim">{"".join(names)}</div>'


def axis(low: float, high: float) -> list[float]:
    """At most GRID + 1 round numbers, equally far apart, that span low to high."""
    high = high if high > low else low + 1
    rough = (high - low) / GRID
    power = 10 ** math.floor(math.log10(rough))
    while True:
        for step in (1, 2, 2.5, 5):
            first, last = math.floor(low / (step * power) + 1e-9), math.ceil(high / (step * power) - 1e-9)
            if last - first <= GRID:
                return [n * step * power for n in range(first, last + 1)]
        power *= 10


def number(value: float) -> str:
    """A number of an axis, as short as possible."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("e-0", "e-").replace("-", "−")


def thin(points: Points) -> Points:
    """At most POINTS points, each the mean of equally many neighbours (or one more)."""
    if len(points) <= POINTS:
        return points
    edges = [number * len(points) // POINTS for number in range(POINTS + 1)]
    groups = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
