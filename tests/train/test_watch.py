"""`mmv eval --watch`: the weights of another process's run, measured as soon as they are on the disk."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from minimind_v.core.errors import MissingInput
from minimind_v.core.files import Lock, is_locked
from minimind_v.core.monitor.metrics import TaskScores
from minimind_v.core.train import watch as watching
from minimind_v.core.train.watch import WatchedRun, watch
from tests.cli.harness import SIGHT, Running, read_rows, run_mmv, sighted, tiny_data
from tests.train.staying import STEP, UNTIL, stay

NAME = "sft_vlm_128"


@pytest.fixture
def run(tmp_path):
    """A run folder with weights of step 7, which began an hour before."""
    folder = tmp_path / NAME
    (folder / "states").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 7, "steps": 9, "loss": 1.0}\n')
    (folder / "manifest.json").write_text('{"starts": [{"after_updates": 0}]}')
    written(folder / "config.yaml", 0)
    written(folder / "states" / "step-0000000007-aa.safetensors", 3600)
    written(tmp_path / f"{NAME}.pth", 3601)
    return WatchedRun.find(folder, tmp_path)


def written(path, second):
    path.write_text("")
    os.utime(path, (second, second))


def scores(step):
    return TaskScores(step, "vqa", "d", 1, 1, "vqa", 0.5, None, None, None, {"blank": {"value": None}}, [], "p", 0.1)


def test_the_step_of_the_weights_is_that_of_the_newest_state(run):
    assert run.saved(running=True).step == 7


def test_weights_are_not_taken_while_a_save_is_about_to_replace_them(run):
    written(run.folder / "states" / "step-0000000008-bb.safetensors", 3700)
    assert run.saved(running=True) is None
    written(run.weights, 3700)
    assert run.saved(running=True).step == 8


def test_weights_of_an_earlier_run_are_not_taken(run):
    written(run.folder / "config.yaml", 4000)
    assert run.saved(running=True) is None
    (run.folder / "manifest.json").write_text('{"starts": [{"after_updates": 0}, {"after_updates": 7}]}')
    assert run.saved(running=True).step == 7, "a resumed run has written them"


def test_replaced_weights_are_noticed(run):
    saved = run.saved(running=True)
    assert saved.unchanged
    run.weights.unlink()
    assert not saved.unchanged
    written(run.weights, 3602)
    assert not saved.unchanged


def test_new_weights_are_measured_until_the_run_has_ended(run, monkeypatch):
    lock = Lock(run.weights.with_name(f".{NAME}.lock"), {})
    assert is_locked(lock.path)
    tried, said = [], []

    def measure(saved):
        tried.append(saved.step)
        return None if len(tried) == 1 else scores(saved.step)  # replaced while it was read

    def pause(seconds):
        if tried == [7, 7]:
            written(run.folder / "states" / "step-0000000008-bb.safetensors", 3700)
            written(run.weights, 3700)
            lock.release()

    monkeypatch.setattr(watching.time, "sleep", pause)
    assert [own.step for own in watch(run, measure, said.append)] == [7, 8]
    assert tried == [7, 7, 8]
    assert "waiting for its next weights" in said[0]
    assert "was stopped at step 8 of 9" in said[1], "the newest state is newer than the last line of the curve"
    lines = read_rows(run.folder / "evaluations.jsonl")
    assert [(line["step"], line["evaluation"]["value"]) for line in lines] == [(7, 0.5), (8, 0.5)]


def test_a_run_that_has_ended_is_measured_once_and_the_end_is_told(run):
    (run.folder / "metrics.jsonl").write_text('{"step": 9, "steps": 9, "loss": 1.0}\n')
    said = []
    assert [own.step for own in watch(run, lambda saved: scores(saved.step), said.append)] == [7]
    assert said == [f"{run.folder} has ended after all 9 steps"]


def test_a_run_that_has_ended_without_weights_is_an_error(run):
    run.weights.unlink()
    with pytest.raises(MissingInput, match=r"was stopped at step 7 of 9.*no weights to measure"):
        list(watch(run, scores, str))


def test_a_run_that_starts_is_waited_for_and_one_that_has_not_begun_is_an_error(tmp_path):
    with pytest.raises(MissingInput, match="no run at sft has begun"):
        WatchedRun.find(Path("sft"), tmp_path)
    lock = Lock(tmp_path / ".sft.lock", {})
    assert WatchedRun.find(Path("sft"), tmp_path).is_running
    lock.release()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "vqa"), "--watch needs --task and --data"),
        (("--data", "d.jsonl"), "--watch needs --task and --data"),
        (("--task", "vqa", "--data", "d.jsonl", "--model", "m.pth", "--out", "o"), "leave out --model and --out"),
        (("--task", "vqa", "--data", "d.jsonl", "--blind"), "--blind is for an evaluation without --task"),
    ],
)
def test_wrong_options_are_refused(words, message):
    ended = run_mmv("eval", "--watch", "run", *words)
    assert ended.code == 2
    assert message in ended.error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--split", "test"), "is one file; only a folder has splits"),
        (("--device", "gpu0"), "--device gpu0: not available on this machine"),
    ],
)
def test_wrong_options_are_refused_before_a_run_has_weights(tmp_path, words, message):
    lock = Lock(tmp_path / f".{NAME}.lock", {})
    ended = run_mmv("eval", "--watch", tmp_path / NAME, "--task", "vqa", "--data", tiny_data().data("sft"), *words)
    lock.release()
    assert ended.code == 2
    assert message in ended.error


def test_all_that_is_missing_is_named_at_once(tmp_path):
    ended = run_mmv("eval", "--watch", tmp_path / "none", "--task", "vqa", "--data", tmp_path / "none.jsonl")
    assert ended.code == 1
    assert "2 inputs are missing" in ended.error


# --- long: beside a real run ------------------------------------------------------------------------------------------


def questions():
    return "--task", "vqa", "--data", tiny_data().data("sft"), "--limit", 8, "--device", "cpu"


@pytest.mark.long
def test_beside_a_run_every_measured_step_has_the_figures_of_its_weights(tmp_path, monkeypatch):
    """The run stays in step 11 until the weights of step 10 are measured."""
    monkeypatch.setenv(STEP, "11")
    monkeypatch.setenv(UNTIL, str(tmp_path / "measured"))
    words = tiny_data().train(tmp_path / "out", "sft", init=sighted(), epochs=2, lr=2e-3, save_every=10)
    run = Running(tmp_path / "run", *words, prepare=stay)
    run.until(lambda: "step 1/" in run.err)
    beside = Running(tmp_path / "watch", "eval", "--watch", tmp_path / "out" / NAME, *questions(), "--json")
    beside.until(lambda: beside.out)
    (tmp_path / "measured").touch()
    assert run.wait().code == 0
    ended = beside.wait()
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert [line["evaluation"] for line in read_rows(tmp_path / "out" / NAME / "evaluations.jsonl")] == lines
    report = run_mmv(
        "eval", "--model", tmp_path / "out" / f"{NAME}.pth", *questions(), *SIGHT, "--out", tmp_path / "same", "--json"
    ).json
    assert (lines[-1]["metrics"], lines[-1]["visual_gain"]) == (report["metrics"], report["visual_gain"])
    assert run_mmv("report", tmp_path / "out" / NAME).code == 0
    assert "Does it look?" in (tmp_path / "out" / NAME / "report.html").read_text()


@pytest.mark.long
def test_a_killed_run_is_told_and_ctrl_c_ends_the_watch_with_130(tmp_path):
    words = tiny_data().train(tmp_path / "out", "sft", init=sighted(), epochs=10_000, save_every=10)
    run = Running(tmp_path / "run", *words).until((tmp_path / "out" / f"{NAME}.pth").exists)
    words = ("eval", "--watch", tmp_path / "out" / NAME, *questions())
    watches = [Running(tmp_path / name, *words) for name in ("first", "second")]
    for beside in watches:
        beside.until(lambda beside=beside: "step " in beside.out)
    assert watches[0].send(signal.SIGINT).wait().code == 130
    run.send(signal.SIGKILL).wait()
    ended = watches[1].wait()
    assert ended.code == 0, ended.err
    assert "was stopped at step" in ended.err
    assert all("evaluation" in line for line in read_rows(tmp_path / "out" / NAME / "evaluations.jsonl"))
