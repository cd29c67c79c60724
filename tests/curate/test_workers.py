"""Many processes: what they find comes in order, and none outlives the one that started them."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time

import numpy as np
import pytest

from minimind_v.core.curate.check import Packed
from minimind_v.core.curate.workers import each_row
from minimind_v.core.errors import RunError
from minimind_v.core.rows.digests import Digests
from tests.cli.harness import SIGHT, Running, read_rows, tiny_data, write_rows
from tests.curate.killer import EndsItsReader, divided_by, killed_by_some


def test_repetitions_are_those_of_a_dictionary():
    rng = np.random.default_rng(0)
    rows = [[int(digest) for digest in rng.integers(0, 90, rng.integers(0, 4))] for _ in range(60)]
    held = [[int(digest) for digest in rng.integers(0, 900, 2)] for _ in range(60)]
    ours, theirs, first, kept = Digests(), Digests(), {}, {}
    for digests, into, index_of in ((rows, ours, first), (held, theirs, kept)):
        for index, some in enumerate(digests):
            for digest in some:
                into.add(index, digest)
                index_of.setdefault(digest, index)
    before = [next((first[digest] for digest in some if first[digest] < n), -1) for n, some in enumerate(rows)]
    repeated = [next((kept[digest] for digest in some if digest in kept), -1) for some in rows]
    assert ours.earlier_copies(60).tolist() == before
    assert ours.copies_in(theirs, 60).tolist() == repeated
    assert len({*before, *repeated}) > 10
    assert Digests().earlier_copies(2).tolist() == ours.copies_in(Digests(), 60)[:2].tolist() == [-1, -1]


def test_packed_items_come_back_in_order():
    packed, items = Packed(), [(n, "kind", f"message {n}") for n in range(10_000)]
    for item in items:
        packed.append(item)
    assert list(packed) == items == list(packed)


def test_every_row_that_kills_is_named():
    assert list(each_row([killed_by_some] * 2, range(50), lambda index: f"killed by {index}")) == [
        "killed by 39" if n == 39 else n for n in range(50)
    ]


def test_nothing_is_left_when_it_ends_however_it_ends():
    """What is left would still be at work while the interpreter ends, which shows as a traceback on a busy machine."""
    threads = set(threading.enumerate())
    results = each_row([killed_by_some] * 2, range(39), str)
    assert [*results] == [*range(39)]
    assert (multiprocessing.active_children(), set(threading.enumerate())) == ([], threads)
    begun = each_row([killed_by_some] * 2, range(39), str)
    assert next(begun) == 0
    begun.close()
    assert (multiprocessing.active_children(), set(threading.enumerate())) == ([], threads)


def test_an_error_over_a_row_is_raised_where_the_rows_are_asked_for():
    with pytest.raises(ZeroDivisionError):
        list(each_row([divided_by] * 1, range(40), str))
    assert multiprocessing.active_children() == []


def test_a_process_that_cannot_begin_is_not_the_fault_of_a_row():
    with pytest.raises(RunError, match="ended before it started"):
        list(each_row([divided_by] * 2, EndsItsReader(), str))
    assert multiprocessing.active_children() == []


@pytest.mark.long
def test_ctrl_c_and_a_kill_leave_no_process_and_no_traceback(tmp_path):
    rows = read_rows(tiny_data().data("sft"))
    many = write_rows(tmp_path / "rows.jsonl", rows * 200)
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        folder = tmp_path / number.name
        running = Running(
            folder, "data", "check", many, "--images", tiny_data().images("sft"), *SIGHT, "--workers", 1
        )  # fmt: skip
        running.until(lambda running=running: "check 8" in running.err).send(number, group=number == signal.SIGINT)
        ended = running.wait()
        assert ended.code == code
        assert "Traceback" not in ended.err
        end = time.monotonic() + 20
        while running.left_behind() and time.monotonic() < end:
            time.sleep(0.1)
        assert running.left_behind() == []
