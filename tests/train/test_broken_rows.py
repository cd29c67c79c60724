"""How many broken rows end a run, and when."""

from __future__ import annotations

import random

import pytest

from minimind_v.core.data.dataset import BrokenRow
from minimind_v.core.data.loader import LANES, WINDOW
from minimind_v.core.errors import DataError
from minimind_v.core.monitor.messages import BrokenRows

MILLION = 10**6


def end_of(broken_at, rows=MILLION, per_step=4, allowed=0.01, broken_before=None, start=0):
    """Rows read when the run ends, or None; `broken_at(n)` says whether the n-th row to be read is broken."""
    counted = BrokenRows(rows, per_step, allowed)
    counted.by_location = broken_before if broken_before is not None else {}
    for first in range(start, rows, per_step):
        numbers = range(first, min(first + per_step, rows))
        broken = [BrokenRow(f"f:{n}", "json", "no") for n in numbers if broken_at(n)]
        if broken:
            try:
                counted.add(broken, numbers.stop, lambda message: None)
            except DataError:
                return numbers.stop
    return None


@pytest.mark.parametrize("per_step", [4, 16, 64])
def test_a_run_over_a_million_rows_whose_first_are_all_broken_ends_early(per_step):
    assert end_of(lambda n: True, per_step=per_step) <= 500
    assert end_of(lambda n: n < 500, per_step=per_step) <= 500


def test_a_fifth_of_broken_rows_ends_a_run_early():
    rng = random.Random(0)
    assert end_of(lambda n: rng.random() < 0.2) < 1000


def test_a_few_broken_rows_early_end_nothing():
    assert end_of(lambda n: n < 40) is None
    assert end_of(lambda n: n % 200 < 1, rows=100_000) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_step", [4, 64])
def test_a_share_that_is_just_allowed_is_borne_to_the_end(seed, per_step):
    """Rows of a window come sorted: the worst is that all its broken rows come first, in all lanes."""
    rng, wide = random.Random(seed), LANES * WINDOW * per_step
    order = []
    while len(order) < 100_000:
        order += sorted((rng.random() < 0.0095 for _ in range(wide)), reverse=True)
    order = order[:100_000]
    if sum(order) <= 1000:
        assert end_of(order.__getitem__, rows=100_000, per_step=per_step) is None


def test_of_all_rows_no_more_than_allowed_may_be_broken():
    assert end_of(lambda n: n < 11, rows=1000) == 12
    assert end_of(lambda n: n < 10, rows=1000) is None
    assert end_of(lambda n: n == 3, rows=1000, allowed=0) == 4
    assert end_of(lambda n: True, rows=1000, allowed=1) is None


def test_a_resumed_run_ends_at_the_same_row():
    whole = end_of(lambda n: n % 3 == 0)
    earlier = {f"f:{n}": ["json", "no"] for n in range(0, 80) if n % 3 == 0}
    assert end_of(lambda n: n % 3 == 0, broken_before=earlier, start=80) == whole


def test_the_end_of_a_run_is_reported_with_the_share_that_would_be_enough():
    counted = BrokenRows(10, 10, 0.01)
    with pytest.raises(DataError, match=r"3 of 10 rows are broken, more than 1%.*data\.bad_rows=0\.5"):
        counted.add([BrokenRow(f"f:{n}", kind, "no") for n, kind in enumerate("aba")], 10, lambda message: None)
    assert counted.kinds == {"a": 2, "b": 1}
    counted = BrokenRows(MILLION, 100, 0.01)
    with pytest.raises(DataError, match=r"400 of the first 400 rows are broken.*for example f:0: no —"):
        counted.add([BrokenRow(f"f:{n}", "a", "no") for n in range(400)], 400, lambda message: None)
