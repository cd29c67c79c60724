"""Saves beside the training: what is written is what was learnt at that update, whatever happens meanwhile."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.train import saver as saving
from minimind_v.core.train.loop import Run
from minimind_v.core.train.resume import States, pack, unpack
from minimind_v.core.train.saver import Saver
from tests.cli.harness import Running, read_rows, run_mmv, tiny_data, tree

NAME = "pretrain_vlm_128"
LINE = {"save_every": 0, "save_minutes": 0}


def states(out):
    return sorted((out / NAME / "states").glob("step-*"))


def step_of(path):
    return int(path.name[5:15])


def assert_same_states(ours, theirs):
    assert [step_of(path) for path in ours] == [step_of(path) for path in theirs]
    for left, right in zip(map(load_file, ours), map(load_file, theirs), strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in right)


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """A run that keeps the state of every update, each written before the next begins."""

    def start(saver, step, write):
        real(saver, step, write)
        saver._running[1].exception()

    real = Saver.start
    monkeypatch.setattr(Saver, "start", start)
    ended = run_mmv(*tiny_data().train(tmp_path / "whole", **LINE | {"save_every": 1}), "--set", "keep=20")
    assert ended.code == 0, ended.err
    monkeypatch.undo()
    return states(tmp_path / "whole")


@pytest.fixture
def slow_disk(monkeypatch):
    """`slow_disk(seconds)` makes writing a state take so long; returns the steps that were begun."""
    real, begun = States.write, []

    def slow(seconds):
        def write(states, step, *rest):
            begun.append(step)
            time.sleep(seconds)
            real(states, step, *rest)

        monkeypatch.setattr(States, "write", write)
        return begun

    return slow


def test_a_state_is_that_of_its_update_however_late_it_is_written(tmp_path, whole, slow_disk):
    slow_disk(0.2)
    ended = run_mmv(*tiny_data().train(tmp_path / "out", **LINE | {"save_every": 3}), "--set", "keep=20")
    assert ended.code == 0, ended.err
    assert_same_states(states(tmp_path / "out"), [path for path in whole if step_of(path) in (3, 6, 9, 10)])


def test_training_continues_while_a_state_is_written(tmp_path, monkeypatch):
    real_write, real_step, later = States.write, Run._launch, threading.Event()

    def write(states, step, *rest):
        assert step != 4 or later.wait(100), "the training waits for the disk"
        real_write(states, step, *rest)

    def patched_step(run, step, batches):
        if step == 7:
            later.set()
        return real_step(run, step, batches)

    monkeypatch.setattr(States, "write", write)
    monkeypatch.setattr(Run, "_launch", patched_step)
    ended = run_mmv(*tiny_data().train(tmp_path / "out", **LINE | {"save_every": 4}))
    assert ended.code == 0, ended.err
    assert [step_of(path) for path in states(tmp_path / "out")] == [8, 10]


# --- by time ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_states_are_saved_by_time_and_resumed_from(tmp_path, whole, slow_disk, monkeypatch):
    real = Run._launch

    def patched_step(run, step, batches):
        if step > 8:
            raise KeyboardInterrupt  # as a second Ctrl-C: nothing is saved any more
        return real(run, step, batches)

    monkeypatch.setattr(saving, "MINUTE", 0.0)
    monkeypatch.setattr(Run, "_launch", patched_step)
    begun = slow_disk(0)
    line = tiny_data().train(tmp_path / "out", **LINE | {"save_minutes": 1})
    assert run_mmv(*line).code == 130
    assert 2 <= len(begun) <= 8, "a save that still runs is not waited for"
    last = max(begun)
    monkeypatch.setattr(Run, "_launch", real)
    ended = run_mmv(*line, "--resume")
    assert ended.code == 0, ended.err
    assert f"resuming after step {last} of 10" in ended.err
    assert_same_states(states(tmp_path / "out")[-1:], whole[-1:])


@pytest.mark.long
@pytest.mark.parametrize(("minutes", "minute"), [(0, 0.0), (2, 60.0)])
def test_before_its_time_nothing_is_saved(tmp_path, slow_disk, monkeypatch, minutes, minute):
    monkeypatch.setattr(saving, "MINUTE", minute)
    begun = slow_disk(0)
    assert run_mmv(*tiny_data().train(tmp_path / "out", **LINE | {"save_minutes": minutes})).code == 0
    assert begun == [10]


def test_states_are_not_saved_by_time_more_often_than_once_a_minute(tmp_path):
    ended = run_mmv(*tiny_data().train(tmp_path / "out", **LINE | {"save_minutes": 0.5}))
    assert ended.code == 2
    assert "--save-minutes must be at least 1, or 0 for never, not 0.5" in ended.error


# --- in the middle of a save ------------------------------------------------------------------------------------------


def slow_sync():
    """Let every file take half a second to reach the disk."""
    real = os.fsync

    def sync(handle):
        print("syncing", file=sys.stderr, flush=True)
        time.sleep(0.5)
        real(handle)

    os.fsync = sync


def in_the_making(out):
    return list((out / NAME / "states").glob(".step-*.tmp"))


@pytest.mark.long
@pytest.mark.parametrize("saved", [0, 1, 3])
def test_a_kill_inside_a_save_loses_nothing_that_was_there(tmp_path, whole, saved):
    out = tmp_path / "out"
    line = tiny_data().train(out, **LINE | {"save_every": 1, "workers": 1})
    run = Running(tmp_path, *line, prepare=slow_sync)
    run.until(lambda: len(states(out)) >= min(saved, 1) and in_the_making(out) and run.err.count("syncing") > 3 * saved)
    run.send(signal.SIGKILL).wait()
    saved_states = states(out)
    assert len(saved_states) >= min(saved, 1)
    assert in_the_making(out), "it was killed inside a save"
    ended = run_mmv(*line, "--resume")
    assert ended.code == 0, ended.err
    assert "damaged" not in ended.err
    assert (
        f"resuming after step {step_of(saved_states[-1])} of 10" if saved_states else "nothing to resume"
    ) in ended.err
    assert not in_the_making(out)
    expected, got = load_file(whole[-1]), load_file(states(out)[-1])
    assert all(
        torch.allclose(got[key].double(), expected[key].double(), atol=1e-4) for key in expected if "rng" not in key
    )


@pytest.mark.long
def test_a_stop_waits_for_the_save_that_runs_and_saves_what_came_after(tmp_path):
    out = tmp_path / "out"
    run = Running(tmp_path, *tiny_data().train(out, **LINE | {"save_every": 3, "epochs": 1000}), prepare=slow_sync)
    run.until(lambda: in_the_making(out))
    ended = run.send(signal.SIGINT).wait()
    assert ended.code == 130, ended.err
    done = len(read_rows(out / NAME / "metrics.jsonl"))
    assert [step_of(path) for path in states(out)] == sorted({3, done})
    assert not [name for name in tree(out) if name.endswith(".tmp")]
    assert read_checkpoint(out / f"{NAME}.pth").stage == "pretrain"


def test_a_defect_in_the_background_is_not_kept_to_itself(tmp_path, monkeypatch):
    def write(*_):
        raise ValueError("not a matter of the disk")

    monkeypatch.setattr(States, "write", write)
    ended = run_mmv(*tiny_data().train(tmp_path / "out", **LINE | {"save_every": 2}))
    assert ended.code == 1
    assert "not a matter of the disk" in ended.err


# --- what a state holds -----------------------------------------------------------------------------------------------


def test_the_file_is_one_that_others_read(tmp_path):
    tensors = {
        "rng.cpu": torch.arange(5, dtype=torch.uint8),
        "step.a": torch.tensor(3.0),
        "weight.a": torch.rand(3, 5)[:, ::2],
        "count": torch.tensor([1, 2]),
        "wide": torch.tensor([0.1], dtype=torch.float64),
    }
    States(tmp_path, 2).write(7, tensors, {"step": 7}, {"lr": 1})
    read = load_file(next(tmp_path.iterdir()))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    state = States(tmp_path, 2).newest(pytest.fail)
    assert (state.progress, state.origin) == ({"step": 7}, {"lr": 1})


def test_a_gpu_that_is_not_used_is_left_alone(monkeypatch):
    """Asking for its random numbers would start it up, and take half a gigabyte of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "set_rng_state", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("the GPU is asked"))
    layer = nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(layer.parameters())
    named = dict(layer.named_parameters())
    tensors = pack(named, optimiser)
    assert "rng.cuda" not in tensors
    unpack(tensors | {"rng.cuda": torch.zeros(16, dtype=torch.uint8)}, named, optimiser)
