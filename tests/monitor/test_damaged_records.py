"""Records of a run that a power cut, a full disk or an editor has damaged: left out, and named by file and line."""

import json

import pytest

from minimind_v.core.monitor.metrics import JsonLines, read_metrics
from minimind_v.core.monitor.records import LONGEST, REPORTED
from tests.cli.harness import run_mmv

STEP = {
    "step": 1, "steps": 9, "epoch": 0.1, "loss": 2.5, "hits": 0.5, "lr": 1e-4, "grad_norm": 1.0, "samples": 4,
    "tokens": 90, "supervised_tokens": 40, "seconds": 1.5, "data_seconds": 0.1,
}  # fmt: skip


def step(number, **changes):
    return json.dumps(STEP | {"step": number, "seconds": 1.5 * int(number), "samples": 4} | changes)


def run_of(folder, lines):
    text = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    (folder / "metrics.jsonl").write_bytes(text)
    return folder


DAMAGED = {
    "cut": (step(2)[:40], "not a line of JSON"),
    "NUL": (b"\0" * 300, "300 NUL bytes, as a power cut leaves them"),
    "NUL inside": (step(2).encode()[:40] + b"\0\0", "2 NUL bytes"),
    "two lines in one": (step(2) + step(3), "not a line of JSON"),
    "no text": (b"\xff\xfe\x00\x01"[:2], "not a line of JSON"),
    "nested": ("[" * 5000, "not a line of JSON"),
    "huge": ('{"step": 2, "loss": "' + "x" * LONGEST + '"}', "the line is longer than 1,048,576 bytes"),
    "a list": ("[1]", "not a record of a run"),
    "no step": ('{"loss": 1}', "not a record of a run (it has no step)"),
    "a text for a step": (step("2"), "step is '2'"),
    "a truth for a step": (step(True), "step is True"),
    "a text for a loss": (step(2, loss="low"), "loss is 'low'"),
    "no seconds": (json.dumps({"step": 2, "loss": 1, "samples": 3}), "no seconds"),
    "a list for seconds": (step(2, seconds=[1]), "seconds is a list"),
    "nothing for samples": (step(2, samples=None), "samples is None"),
    "seconds without end": (step(2, seconds=float("inf")), "seconds is inf"),
    "a number of a thousand digits": (
        f'{{"step": 2, "loss": 1, "seconds": 1, "samples": {"9" * 1000}}}',
        "samples is a number that is too large",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_line_is_named_and_the_others_make_the_report(tmp_path, name):
    line, message = DAMAGED[name]
    ended = run_mmv("report", run_of(tmp_path, [step(1), line, step(3), step(4)]))
    assert ended.code == 0, ended.err
    assert f"{tmp_path / 'metrics.jsonl'}:2: {message}" in ended.err
    assert "left out of the report" in ended.err
    assert "4 of 9 steps" in (tmp_path / "report.html").read_text()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl", needed=REPORTED)] == [1, 3, 4]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_run_of_nothing_but_damage_says_what_and_where(tmp_path, name):
    line, message = DAMAGED[name]
    ended = run_mmv("report", run_of(tmp_path, [line]))
    assert ended.code == 1
    assert ended.error.startswith(f"{tmp_path / 'metrics.jsonl'}:1: ")
    assert message in ended.error


def test_a_loss_that_is_no_number_is_no_damage(tmp_path):
    ended = run_mmv("report", run_of(tmp_path, [step(1, loss=float("nan"), grad_norm=float("inf")), step(2)]))
    assert (ended.code, ended.err) == (0, "")


def test_many_damaged_lines_are_counted(tmp_path):
    ended = run_mmv("report", run_of(tmp_path, [step(1), *["{"] * 100]))
    assert ended.code == 0
    assert len(ended.err.splitlines()) == 6
    assert "95 more damaged records" in ended.err


EVENTS = [
    {"step": 1, "warning": 3},
    {"step": 1, "sign": ["x"], "warning": "w"},
    {"step": 1, "validation": 3},
    {"step": 1, "validation": 3, "loss": 1.0},
    {"step": 1, "validation": {"step": 1, "loss": "low", "hits": 1, "rows": 1, "swapped_loss": None}},
    {"step": 1, "validation": {"step": 1, "loss": 1.0}},
    {"step": 1, "recalled": [1]},
    {"step": 1, "recalled": {"own": 3}},
    {"step": 1, "recalled": {"own": {"data": 3, "rows": 1, "loss": 1, "hits": 1}}},
    {"step": 1, "recalled": {"own": {"data": "x", "rows": 1, "hits": 1}}},
    {"step": 1, "memory_bytes": "much"},
]


@pytest.mark.parametrize("event", EVENTS)
def test_a_damaged_event_is_named(tmp_path, event):
    run_of(tmp_path, [step(1)])
    good = {"step": 1, "validation": {"step": 1, "loss": 1.5, "hits": 0.5, "swapped_loss": None, "rows": 3}}
    lines = [good, event, {"step": 1, "warning": "all is slow"}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = run_mmv("report", tmp_path)
    assert ended.code == 0, ended.err
    assert f"{tmp_path / 'events.jsonl'}:2: " in ended.err
    page = (tmp_path / "report.html").read_text()
    assert "all is slow" in page
    assert "best validation loss" in page


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("manifest.json", "{", "not a JSON object"),
        ("manifest.json", "[" * 5000, "not a JSON object"),
        ("manifest.json", '{"config": [1], "stage": "sft"}', "config is a list"),
        ("manifest.json", '{"starts": 3}', "starts is 3"),
        ("forecast.json", '{"seconds": "long"}', "seconds is 'long'"),
        ("forecast.json", '{"cost": 1e400, "updates": 3}', "cost is inf"),
    ],
)
def test_damaged_notes_of_a_run_are_named(tmp_path, name, text, message):
    run_of(tmp_path, [step(1)])
    (tmp_path / name).write_text(text)
    ended = run_mmv("report", tmp_path)
    assert ended.code == 0, ended.err
    assert f"{tmp_path / name}: {message}" in ended.err


def test_starts_of_a_manifest_that_are_none_are_no_error(tmp_path):
    run_of(tmp_path, [step(1)])
    deep = '{"a":' * 400 + "1" + "}" * 400
    (tmp_path / "manifest.json").write_text(f'{{"starts": [3, {{"git": 4, "machine": [5]}}], "config": {deep}}}')
    assert run_mmv("report", tmp_path).code in (0, 1)


def test_a_resumed_run_keeps_the_whole_lines(tmp_path):
    run_of(tmp_path, [step(1), b"\0" * 20, step(2), step(3)])
    JsonLines(tmp_path / "metrics.jsonl", 2).close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert b"\0" not in (tmp_path / "metrics.jsonl").read_bytes()
