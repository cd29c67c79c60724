"""Some changed files of every format do no harm; and the loop that reads them reports the harm that there is."""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path

import pytest

from minimind_v.core.errors import DataError, MmvError
from tests.fuzz import run
from tests.fuzz.readers import FORMATS, Format, Refused

SEED, CASES = 11, 25
QUICK = run.Limits(cpu=1, wall=20, memory=2**28)
TEXT = b"a file that holds a little text"


@pytest.fixture(scope="module")
def loop():
    """Over all formats: their examples are made once."""
    loop = run.Loop(FORMATS, SEED)
    yield loop
    loop.close()


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_changed_files_are_read_or_refused_in_one_line(loop, name):
    """What fails here is repeated by `python -m tests.fuzz --seed 11 --cases 25 --only NAME`, which keeps its files."""
    loop.formats, loop.report = {name: FORMATS[name]}, run.Report()
    loop.run(cases=CASES, say=lambda line: None)
    assert loop.report.counts[name].total() == CASES
    assert not loop.report.faults, run.table(loop.report)


def test_a_case_is_the_same_each_time(loop):
    again = run.make_examples(FORMATS)
    assert again == loop.examples
    for name, format in FORMATS.items():
        cases = [run.changed_tree(name, format, again[name], SEED, number) for number in range(5)]
        assert cases == [run.changed_tree(name, format, loop.examples[name], SEED, number) for number in range(5)]
        others = [run.changed_tree(name, format, again[name], SEED + 1, number) for number in range(5)]
        assert others != cases
        assert any(case != again[name] for case in cases)


# --- the loop itself: a reader of each way to do harm -----------------------------------------------------------------


def example(folder: Path) -> None:
    (folder / "text").write_bytes(TEXT)


def harm_of(act, proof="", limits=QUICK, cases=3, keep=None):
    """The report over a format whose reader reads the unchanged example, and acts on what was changed."""

    def read(folder):
        data = (folder / "text").read_bytes()
        return {"text": data if data == TEXT else act(data)}

    loop = run.Loop({"made": Format(example, read, proof=proof)}, 1, keep, limits)
    try:
        loop.run(cases=cases, say=lambda line: None)
    finally:
        loop.close()
    return loop.report


def only_fault(report):
    (fault,) = report.faults.values()
    return fault


def fail(error):
    raise error


def spin(data):
    while True:
        pass


def eat(data):
    held = []
    while True:
        held.append(b"x" * 2**24)
        time.sleep(0.001)


def test_an_endless_reader_is_a_hang():
    fault = only_fault(harm_of(spin, cases=1))
    assert (fault.kind, fault.text) == ("hang", "more than 1 s of the processor")


def test_a_reader_that_waits_is_a_hang_and_the_loop_continues_after_it():
    fault = only_fault(harm_of(lambda data: time.sleep(99), limits=run.Limits(cpu=9, wall=1), cases=2))
    assert (fault.kind, fault.text, fault.cases) == ("hang", "more than 1 s", [0, 1])


def test_a_reader_that_eats_memory_is_ended():
    assert only_fault(harm_of(eat, cases=1)).kind == "memory"


def test_memory_that_was_given_back_counts():
    fault = only_fault(harm_of(lambda data: len(b"x" * 2**29), cases=3))
    assert (fault.kind, fault.cases) == ("memory", [0, 1, 2])


def test_any_error_but_the_projects_own_is_a_fault():
    fault = only_fault(harm_of(lambda data: fail(ValueError("odd"))))
    assert (fault.kind, fault.text, fault.cases) == ("exception", "ValueError: odd", [0, 1, 2])
    assert only_fault(harm_of(lambda data: fail(SystemExit(1)))).kind == "exception"
    assert only_fault(harm_of(lambda data: fail(MmvError("")))).text.startswith("not one line")


@pytest.mark.parametrize(
    ("act", "signal"), [(lambda data: ctypes.string_at(0), "SIGSEGV"), (lambda data: os.abort(), "SIGABRT")]
)
def test_a_reader_that_dies_is_a_fault_of_its_case(act, signal):
    fault = only_fault(harm_of(act))
    assert (fault.kind, fault.cases) == ("dead", [0, 1, 2])
    assert fault.text.startswith(signal)


def test_an_exit_without_a_word_is_a_death():
    assert only_fault(harm_of(lambda data: os._exit(0))).text.startswith("exit code 0")


def test_other_data_is_wrong_only_where_a_checksum_promises_it():
    assert not harm_of(lambda data: data).faults
    assert only_fault(harm_of(lambda data: data, proof="whole")).kind == "wrong data"
    assert not harm_of(lambda data: Refused("damaged"), proof="whole").faults


def test_an_error_in_one_line_is_right():
    report = harm_of(lambda data: fail(DataError("damaged — download it again")))
    assert not report.faults
    assert report.counts["made"] == {"error": 3}


def test_an_example_that_cannot_be_read_is_a_fault():
    format = Format(example, lambda folder: fail(DataError("what?")))
    loop = run.Loop({"made": format}, 1)
    try:
        loop.run(cases=3, say=lambda line: None)
    finally:
        loop.close()
    assert only_fault(loop.report).kind == "example"


def test_what_did_harm_is_kept_and_can_be_read_again(tmp_path):
    fault = only_fault(harm_of(lambda data: fail(KeyError("x")), keep=tmp_path, cases=9))
    assert len(fault.kept) == 3
    record = json.loads((fault.kept[0] / "case.json").read_text())
    assert record["repeat"].endswith(f"--again {fault.kept[0]}")
    assert (fault.kept[0] / "files" / "text").read_bytes() != TEXT
    whole = Format(example, lambda folder: {})
    broken = Format(example, lambda folder: fail(KeyError()) if (folder / "text").read_bytes() != TEXT else {})
    assert run.read_again({"made": whole}, fault.kept[0]).kind == "data"
    assert run.read_again({"made": broken}, fault.kept[0]).kind == "exception"
