"""No process outlives the one that started it, whenever that is killed; none that hangs keeps a run from its end."""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess

import pytest
import torch

from minimind_v.core import processes
from minimind_v.core.curate.workers import each_row
from minimind_v.core.data import workers
from minimind_v.core.data.dataset import RowDataset
from minimind_v.core.data.loader import load_batches, load_steps
from minimind_v.core.export.prove.worker import Worker
from minimind_v.core.processes import Parent, end_processes
from tests.cli.harness import Running, sessions, tiny_data

WORKERS = 6


# --- killed while it starts -------------------------------------------------------------------------------------------


class Numbers:
    """A plan that is read in no time, by many."""

    prefetch = 2

    def __len__(self):
        return 1000

    def __getitem__(self, number):
        time.sleep(0.01)
        return [torch.tensor(number)]


def start_data_workers():
    print("now", flush=True)
    for _ in load_batches(Numbers(), WORKERS):
        pass


def slow(rows, index):
    time.sleep(600)


def start_row_processes():
    print("now", flush=True)
    list(each_row([slow] * WORKERS, range(1000), str))


def start_export_worker():
    print("now", flush=True)
    with Worker() as worker:
        worker.call(f"{__name__}:sleep")


def sleep():
    time.sleep(600)


@pytest.fixture
def starting(tmp_path):
    """`starting(function)` is a process that is about to start others by that function."""
    begun = []

    def start(function):
        begun.append(Running(tmp_path, prepare=function))
        return begun[-1].until(lambda: "now" in begun[-1].out)

    yield start
    for process in begun:
        for pid in (*process.left_behind(), *[process.pid] * process.alive):
            os.kill(pid, signal.SIGKILL)


def wait_until(happened, seconds):
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.002)
    return happened()


@pytest.mark.long
@pytest.mark.parametrize(
    ("start", "count"),
    [
        (start_data_workers, 1),
        (start_data_workers, WORKERS // 2),
        (start_data_workers, WORKERS),
        (start_row_processes, 2),
        (start_row_processes, WORKERS),
        (start_export_worker, 1),
    ],
)
def test_a_process_that_is_killed_while_it_starts_others_leaves_none(starting, start, count):
    process = starting(start)
    assert wait_until(lambda: len(process.left_behind()) >= count, 60)
    time.sleep(random.Random(f"{start.__name__} {count}").uniform(0, 0.05))
    process.send(signal.SIGKILL).wait()
    assert wait_until(lambda: not process.left_behind(), 30)  # those that still import notice it then


@pytest.mark.long
def test_a_child_whose_parent_ended_before_the_first_check_ends():
    """The moment at which nobody would ever tell it: its parent ended before it could ask for a signal."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=Parent(2**22 + 1).end_with_it)
    child.start()
    child.join(20)
    assert child.exitcode == 1


@pytest.mark.long
@pytest.mark.parametrize("system", ["signals", "watches", "starts from a thread"])
def test_a_child_ends_with_its_parent(system, tmp_path):
    context, path = multiprocessing.get_context("fork"), tmp_path / "pid"

    def child(parent):
        if system == "watches":
            processes._ask_for_signal = lambda: False
        parent.end_with_it()
        path.write_text(str(os.getpid()))
        time.sleep(600)

    def parent():
        living = Parent.current() if system != "starts from a thread" else Parent(os.getpid(), lasting=False)
        context.Process(target=child, args=(living,)).start()
        time.sleep(600)

    first = context.Process(target=parent)
    first.start()
    assert wait_until(lambda: path.exists() and path.read_text(), 20)
    pid = int(path.read_text())
    first.kill()
    first.join()
    assert wait_until(lambda: pid not in dict(sessions()), 10)


# --- one that hangs ---------------------------------------------------------------------------------------------------


def hang_after_some():
    """Let data workers hang for ever, deaf to SIGTERM, over rows that the run's two updates do not need."""
    real, loaded, main = RowDataset.load, [], os.getpid()

    def load(dataset, example):
        loaded.append(example)
        if len(loaded) > 8 and os.getpid() != main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(600)
        return real(dataset, example)

    RowDataset.load = load


@pytest.mark.long
def test_a_run_ends_although_its_workers_hang(tmp_path):
    line = tiny_data().train(tmp_path / "out", epochs=100, workers=3, max_steps=4)
    run = Running(tmp_path, *line, prepare=hang_after_some)
    run.until(lambda: "done after 4 steps" in run.err)
    started = time.monotonic()
    ended = run.wait()
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert time.monotonic() - started < 20
    assert not run.left_behind()


class Stuck(Numbers):
    """A plan over whose second number a worker hangs for ever."""

    def __getitem__(self, number):
        if number > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        return [torch.tensor(number)]


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 0.3)
    monkeypatch.setattr(processes, "KILLED", 0.3)


@pytest.mark.usefixtures("hasty")
def test_many_workers_that_hang_are_ended_together():
    before = set(multiprocessing.active_children())
    steps = load_steps(Stuck(), 4)
    next(steps)
    started = time.monotonic()
    steps.close()
    assert time.monotonic() - started < 9  # torch gives each of them ten seconds
    assert set(multiprocessing.active_children()) == before


@pytest.mark.usefixtures("hasty")
def test_what_cannot_be_killed_is_left_and_waited_for_by_nobody(monkeypatch):
    """A process in an uninterruptible sleep, as over a dead network disk: the system keeps it, whatever it is sent."""
    kill = BaseProcess.kill
    monkeypatch.setattr(BaseProcess, "kill", lambda process: None)
    monkeypatch.setattr(BaseProcess, "terminate", lambda process: None)
    steps = load_steps(Stuck(), 2)
    next(steps)
    stuck = multiprocessing.active_children()
    started = time.monotonic()
    steps.close()
    assert time.monotonic() - started < 9
    assert not set(stuck) & multiprocessing.process._children  # for which the interpreter would wait at its end
    for process in stuck:
        kill(process)
        process.join()


@pytest.mark.long
def test_those_that_end_by_themselves_are_given_the_time(monkeypatch):
    context = multiprocessing.get_context("fork")
    child = context.Process(target=time.sleep, args=(0.3,))
    child.start()
    assert end_processes([child], 20) == []
    assert child.exitcode == 0
