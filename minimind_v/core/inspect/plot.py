"""Curves as SVG for a page that is one file."""

from __future__ import annotations

import math
from html import escape
from itertools import pairwise

WIDTH, HEIGHT, LEFT, FOOT, TOP = 800, 240, 60, 28, 14
POINTS = 400  # of a curve; of more, neighbours become their mean
COLOURS = ("#2457d6", "#d9685d", "#35a35c", "#d98a2b")

Points = list[tuple[float, float]]

STYLE = """
.curves { width: 100%; height: auto; min-width: 30rem } .curves polyline { fill: none; stroke-width: 1.8 }
.curves line { stroke: var(--line) } .legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .2rem 0 }
.legend i { display: inline-block; width: 1.2rem; height: .2rem; vertical-align: middle; margin-right: .4rem }
"""


def curves(series: dict[str, Points]) -> str:
    """Named curves of (update, y) over one axis that begins at 0, with a legend where there are several.

    What is not finite is left out.
    """
    shown = {name: thin([point for point in points if math.isfinite(point[1])]) for name, points in series.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return '<p class="dim">nothing to show</p>'
    xs, ys = zip(*(point for points in shown.values() for point in points), strict=True)
    x_low, x_high, y_low, y_high = min(xs), max(xs), 0.0, max(ys)
    y_low, y_high = (y_low, y_high) if y_high > y_low else (y_low - 0.5, y_high + 0.5)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - 10), HEIGHT - FOOT - up * (HEIGHT - FOOT - TOP)

    drawn = [_axes(x_low, x_high, y_low, y_high)]
    for colour, points in zip(COLOURS * len(shown), shown.values(), strict=False):
        line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        drawn.append(f'<polyline points="{line}" stroke="{colour}"/>')
        if len(points) < 2:
            x, y = place(*points[0])
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
    names = zip(COLOURS * len(shown), shown, strict=False)
    legend = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for colour, name in names)
    below = f'<div class="legend dim">{legend}</div>' if len(shown) > 1 else ""
    return f'<div class="wide"><svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(drawn)}</svg></div>{below}'


def thin(points: Points) -> Points:
    """At most POINTS points; each stands for as many neighbours as any other, or one more."""
    if len(points) <= POINTS:
        return points
    edges = [number * len(points) // POINTS for number in range(POINTS + 1)]
    parts = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _axes(x_low: float, x_high: float, y_low: float, y_high: float) -> str:
    drawn = []
    for number in range(5):
        y = HEIGHT - FOOT - number / 4 * (HEIGHT - FOOT - TOP)
        value = y_low + number / 4 * (y_high - y_low)
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    drawn.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">update {x_low:,.0f}</text>')
    drawn.append(f'<text x="{WIDTH - 10}" y="{HEIGHT - 8}" text-anchor="end">{x_high:,.0f}</text>')
    return "".join(drawn)
