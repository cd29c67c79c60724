"""Charts: axes that people can read, and labels that are never scaled with the drawing."""

import math
import re
from itertools import pairwise

import pytest

from minimind_v.core.pages import frame as page
from minimind_v.core.pages.plot import GRID, Interval, axis, curves, intervals, number
from minimind_v.core.pages.stats import _plot

RANGES = [(0, 1.97), (0, 0.446), (0, 1), (0, 0), (0, 4217), (0, 0.0011), (0, 3e-7), (-2, 5), (0, 7e9), (0, 0.998)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_an_axis_has_few_round_numbers_equally_far_apart_around_all_values(low, high):
    ticks = axis(low, high)
    assert 3 <= len(ticks) <= GRID + 1
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high
    assert 0.0 in ticks
    steps = [later - earlier for earlier, later in pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps))
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert any(mantissa == pytest.approx(round_one) for round_one in (1, 2, 2.5, 5))
    assert all(float(number(tick).replace(",", "").replace("−", "-")) == pytest.approx(tick) for tick in ticks)


def test_labels_are_text_of_the_page_and_not_of_the_drawing():
    for drawn in (curves({"loss": [(1, 2.0), (40, 0.5)]}), _plot({"edges": [0, 10, 20, 30], "counts": [3, 0, 9]}, 15)):
        drawing = re.search(r"<svg.*</svg>", drawn)[0]
        assert "<text" not in drawing
        assert 'preserveAspectRatio="none"' in drawing
        assert drawn.count("<span") >= 5
    assert ">step 1<" in curves({"loss": [(1, 2.0), (40, 0.5)]})


def test_several_curves_have_a_legend_and_one_has_none():
    assert "legend" not in curves({"loss": [(1, 2.0), (2, 1.0)]})
    drawn = curves({"training": [(1, 2.0), (2, 1.0)], "a<b": [(1, 2.0)], "empty": []})
    assert "a&lt;b" in drawn
    assert "empty" not in drawn
    assert drawn.count("<polyline") == 2


def test_intervals_stand_at_their_values_on_one_axis_with_0():
    drawn = intervals(
        [Interval("a<b", "0.5 [0.25, 1]", 0.5, 0.25, 1.0), Interval("c", "–", None), Interval("d", "", -0.5)]
    )
    assert re.findall(r'class="range" x1="([\d.]+)" x2="([\d.]+)"', drawn) == [("500.0", "1000.0")]
    assert re.findall(r'class="point" x1="([\d.]+)"', drawn) == ["666.7", "0.0"]
    assert re.findall(r'class="zero" x1="([\d.]+)"', drawn) == ["333.3"] * 3
    assert re.findall(r'left:([\d.]+)%">([^<]+)', drawn) == [
        ("0.00", "−0.5"), ("33.33", "0"), ("66.67", "0.5"), ("100.00", "1"),
    ]  # fmt: skip
    assert "a&lt;b" in drawn
    assert "<text" not in drawn


def test_what_is_not_finite_is_left_out():
    assert "no data" in curves({"loss": [(1, math.nan), (2, math.inf)]})
    assert "nan" not in curves({"loss": [(1, 2.0), (2, math.nan), (3, 1.0)]})


def test_the_rows_that_are_cut_are_marked():
    drawn = _plot({"edges": list(range(0, 210, 10)), "counts": [1] * 20}, 155)
    assert drawn.count('class="over"') == 4
    assert 'class="limit"' in drawn
    assert "longer than the 155 tokens" in drawn
    assert len(re.findall(r"<span[^>]*left", drawn)) <= 7


def test_no_table_breaks_a_word():
    """`anywhere` lets a column shrink to a letter; what is too wide is scrolled instead."""
    sheets = {sheet.stem: sheet.read_text(encoding="utf-8") for sheet in page.ASSETS.glob("*.css")}
    assert sheets.keys() >= {"frame", "plot", "preview", "stats", "run_report", "demo_report", "talk", "look"}
    for sheet in sheets.values():
        rules = re.findall(r"([^{}]+)\{([^{}]*)\}", sheet)
        assert [name for name, rule in rules if re.search(r"\b(td|th|table)\b", name) and "anywhere" in rule] == []
    assert "td code { overflow-wrap: normal }" in sheets["frame"]
