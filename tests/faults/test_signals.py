"""Signals to a training run: the first asks, the second insists, and no process outlives the command."""

import os
import signal
import sys
import time

import pytest

from minimind_v.core.formats import load as opening
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.train.loop import Run
from tests.cli.harness import Running, read_rows, run_mmv, tiny_data
from tests.conftest import interrupt_at

LONG = {"epochs": 10_000, "workers": 2}
WEIGHTS = "pretrain_vlm_128.pth"


@pytest.fixture
def run(tmp_path):
    """A training run without end, a few updates after its start."""
    started = Running(tmp_path, *tiny_data().train(tmp_path / "out", **LONG))
    yield started.until(lambda: "step 3/" in started.err)
    if started.alive:
        started.send(signal.SIGKILL)
        started.wait()


def gone(run):
    """Whether all processes of a run are gone, given the seconds that orphaned data workers may take to notice."""
    end = time.monotonic() + 30
    while run.left_behind() and time.monotonic() < end:
        time.sleep(0.1)
    return not run.left_behind()


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "code", "group"),
    [
        (signal.SIGINT, 130, False),
        (signal.SIGINT, 130, True),  # as of Ctrl-C
        (signal.SIGTERM, 143, False),
        (signal.SIGUSR1, 128 + signal.SIGUSR1, False),
    ],
)
def test_one_signal_ends_the_step_saves_and_exits(run, tmp_path, number, code, group):
    ended = run.send(number, group).wait()
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    done = len(read_rows(tmp_path / "out" / "pretrain_vlm_128" / "metrics.jsonl"))
    assert f"stopped by {number.name} after {done} steps; weights in " in ended.err
    assert read_checkpoint(tmp_path / "out" / WEIGHTS).stage == "pretrain"
    assert gone(run)


@pytest.mark.long
def test_a_second_signal_stops_at_once(tmp_path):
    """In the middle of an update: what it would leave is neither before nor after, so it is not saved."""
    run = Running(tmp_path, *tiny_data().train(tmp_path / "out", **LONG), prepare=slow_steps)
    run.until(lambda: "in an update" in run.err)
    run.send(signal.SIGINT).until(lambda: "asked to stop" in run.err)
    ended = run.send(signal.SIGINT).wait()
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert "stopped at once — nothing is saved: start again with --overwrite" in ended.err
    assert gone(run)


def test_a_second_signal_says_from_which_state_to_resume(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 4)
    line = tiny_data().train(tmp_path / "out", save_every=2, max_steps=5)
    ended = run_mmv(*line, "--quiet")
    assert ended.code == 130
    assert "stopped at once — resume from step 2 with --resume" in ended.err
    monkeypatch.undo()
    assert "resuming after step 2" in run_mmv(*line, "--resume").err


def slow_steps():
    """Make every update but the first last for ever."""
    real = Run._launch

    def patched_step(run, step, batches):
        if step > 1:
            print("in an update", file=sys.stderr)
            while True:
                time.sleep(0.1)
                if run.stop.signal:
                    print("asked to stop", file=sys.stderr)
        return real(run, step, batches)

    Run._launch = patched_step


@pytest.mark.long
def test_a_signal_before_the_first_update_ends_the_command_too(tmp_path):
    run = Running(tmp_path, *tiny_data().train(tmp_path / "out", **LONG), prepare=slow_loading)
    run.until(lambda: "loading" in run.err)
    ended = run.send(signal.SIGINT).wait()
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def slow_loading():
    """Make loading the vision model last a minute."""

    def load(*_):
        print("loading", file=sys.stderr)
        time.sleep(60)

    opening.build_encoder = load


@pytest.fixture
def heard():
    """SIGINT raises, as it does in a terminal: what a shell starts in its background begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_an_interrupt_that_became_another_error_on_its_way_is_an_interrupt(tmp_path, monkeypatch):
    """An import that is interrupted in the middle may fail over what it left half-done."""

    def load(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise AttributeError("module 'numpy' has no attribute 'matrix'") from None

    monkeypatch.setattr(opening, "build_encoder", load)
    before = signal.getsignal(signal.SIGINT)
    ended = run_mmv(*tiny_data().train(tmp_path / "out"))
    assert ended.code == 130
    assert "defect" not in ended.err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.long
def test_killed_outright_no_worker_survives(run):
    assert len(run.left_behind()) >= 2  # its data workers
    assert run.send(signal.SIGKILL).wait().code == -signal.SIGKILL
    assert gone(run)


@pytest.mark.long
def test_a_worker_that_is_killed_ends_the_run_with_a_next_step(run, tmp_path):
    for worker in run.left_behind():
        os.kill(worker, signal.SIGKILL)
    ended = run.wait()
    assert ended.code == 1
    assert "a data worker died" in ended.error
    assert "--workers 0" in ended.error
    assert read_checkpoint(tmp_path / "out" / WEIGHTS).stage == "pretrain"  # what was learnt is kept
    assert gone(run)


@pytest.mark.long
def test_after_a_stop_the_next_run_asks_before_it_replaces(run, tmp_path):
    run.send(signal.SIGTERM).wait()
    again = run_mmv(*tiny_data().train(tmp_path / "out"))
    assert again.code == 2
    assert "--overwrite" in again.error
