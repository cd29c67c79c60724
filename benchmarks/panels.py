"""Small charts side by side in one SVG, drawn in tones that are read on white as on black."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 250  # of a panel
LEFT, RIGHT, TOP, FOOT = 52, 24, 46, 42
COLUMNS = 2
COLOURS = ("#3b7ddd", "#d9685d")
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #7d8590 } .title { font-size: 14px; font-weight: 600 }
.grid { stroke: #7d8590; stroke-opacity: .25 } .fit { stroke-width: 1.6; stroke-opacity: .6 }
"""


@dataclass(frozen=True)
class Panel:
    """A chart of points (x, y) by name, with the straight line that fits each best; y begins at 0."""

    title: str
    below: str  # what x counts
    unit: str  # of y
    series: dict[str, Points]


def line_through(points: Points) -> tuple[float, float, float]:
    """The line of least squares: slope, value at 0, and how far points are off at the most, as a share."""
    xs, ys = np.array(points, dtype=float).T
    slope, start = np.polyfit(xs, ys, 1)
    return float(slope), float(start), float(np.max(np.abs(slope * xs + start - ys) / ys))


def draw(panels: Sequence[Panel]) -> str:
    """The picture as SVG."""
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * WIDTH, rows * HEIGHT
    drawn = []
    for number, panel in enumerate(panels):
        row, column = divmod(number, COLUMNS)
        drawn.append(f'<g transform="translate({column * WIDTH} {row * HEIGHT})">{"".join(_panel(panel))}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<style>{STYLE}</style>\n" + "\n".join(drawn) + "\n</svg>\n"
    )


class _Frame:
    """Where a panel's values stand in it."""

    def __init__(self, panel: Panel) -> None:
        points = [point for series in panel.series.values() for point in series]
        self.xs = sorted({x for x, _ in points})
        self.ticks = _ticks(max(y for _, y in points))

    def position(self, x: float, y: float) -> tuple[float, float]:
        across, up = x / self.xs[-1], y / self.ticks[-1]
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(HEIGHT - FOOT - up * (HEIGHT - FOOT - TOP), 1)


def _panel(panel: Panel) -> list[str]:
    frame, middle = _Frame(panel), (LEFT + WIDTH - RIGHT) / 2
    drawn = [f'<text class="title" x="{LEFT}" y="18">{escape(panel.title)}</text>', *_axes(frame, panel.unit)]
    drawn.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(panel.below)}</text>')
    for series, colour in zip(panel.series.values(), COLOURS, strict=False):
        drawn += _series(frame, series, colour)
    if len(panel.series) > 1:
        names = zip(panel.series, COLOURS, strict=False)
        spans = "".join(f'<tspan fill="{colour}">● </tspan>{escape(name)}   ' for name, colour in names)
        drawn.append(f'<text x="{LEFT}" y="36" xml:space="preserve">{spans}</text>')
    return drawn


def _axes(frame: _Frame, unit: str) -> list[str]:
    drawn, taken = [], -math.inf
    for value in frame.ticks:
        y = frame.position(0, value)[1]
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        label = f"{value:g} {unit}" if value == frame.ticks[-1] else f"{value:g}"
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
    for value in frame.xs:  # those that have room
        x = frame.position(value, 0)[0]
        if x - taken > 34:
            drawn.append(f'<text x="{x}" y="{HEIGHT - FOOT + 16}" text-anchor="middle">{_short(value)}</text>')
            taken = x
    return drawn


def _series(frame: _Frame, series: Points, colour: str) -> list[str]:
    slope, start, _ = line_through(series)
    (x1, y1), (x2, y2) = (frame.position(x, slope * x + start) for x in (min(series)[0], max(series)[0]))
    dots = [frame.position(*point) for point in series]
    return [
        f'<line class="fit" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}"/>',
        *(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in dots),
    ]


def _ticks(highest: float) -> list[float]:
    """From 0 in even steps of one digit to just above the highest value."""
    power = 10.0 ** (math.floor(math.log10(highest)) - 1)
    step = next(step * power for step in (2, 5, 10, 20) if highest <= 5 * step * power)
    return [number * step for number in range(math.ceil(highest / step) + 1)]


def _short(value: float) -> str:
    return f"{value / 1000:g} k" if value >= 10_000 else f"{value:,g}"
