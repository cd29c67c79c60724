"""Two runs into one folder: the second is refused as long as the first lives, and not a moment longer."""

import errno
import fcntl
import multiprocessing
import os
import platform
import signal
import sys
import time

import pytest

from minimind_v.core.files import Held, Lock, write_text
from minimind_v.core.formats import load as opening
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.train import records
from tests.cli.harness import Running, read_rows, run_mmv, sighted, tiny_data, tree
from tests.train.staying import STEP, UNTIL, stay
from tests.train.test_distributed import workers_of

LONG = {"epochs": 10_000, "workers": 2, "save_every": 3}
NAME = "pretrain_vlm_128"
LOCK = f".{NAME}.lock"


@pytest.fixture
def start(tmp_path):
    """`start(...)` is a run into `tmp_path / "out"`; it is killed at the end of the test."""
    started = []

    def begin(*options, prepare=None, **changes):
        line = tiny_data().train(tmp_path / "out", **LONG | changes)
        started.append(Running(tmp_path / f"run{len(started)}", *line, *options, prepare=prepare))
        return started[-1]

    yield begin
    for run in started:
        if run.alive:
            run.send(signal.SIGKILL, group=True).wait()


def assert_refused(ended, run):
    assert ended.code == 2, ended.err
    assert f"another run is writing {run}" in ended.error
    assert f"on {platform.node()}, since 20" in ended.error
    assert "--out" in ended.error


# --- as long as the first lives ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_second_is_refused_in_the_middle_of_the_first(tmp_path, start, monkeypatch):
    monkeypatch.setenv(STEP, "4")
    monkeypatch.setenv(UNTIL, str(tmp_path / "never"))
    run = start(prepare=stay).until(lambda: (tmp_path / "out" / f"{NAME}.pth").exists())
    for options in ((), ("--resume",), ("--overwrite",)):
        ended = run_mmv(*tiny_data().train(tmp_path / "out"), *options)
        assert_refused(ended, tmp_path / "out" / f"{NAME}.pth")
        assert f"(process {run.pid} on" in ended.error
    ended = run.send(signal.SIGTERM).wait()
    assert ended.code == 143, ended.err
    steps = [record["step"] for record in read_rows(tmp_path / "out" / NAME / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)), "only one run has written"
    assert LOCK not in tree(tmp_path / "out")


def lasting(word):
    """What says a word and then takes a minute."""

    def work(*_):
        print(word, file=sys.stderr)
        time.sleep(60)

    return work


def slow_loading():
    """Make loading the vision model last a minute."""
    opening.build_encoder = lasting("loading")


@pytest.mark.long
def test_the_second_is_refused_while_the_first_is_loading(tmp_path, start):
    start(prepare=slow_loading).until(lambda: (tmp_path / "out" / LOCK).exists())
    assert_refused(run_mmv(*tiny_data().train(tmp_path / "out")), tmp_path / "out")
    assert tree(tmp_path / "out") == [LOCK]


def slow_report():
    """Make the report at the end last a minute."""
    records.write_report = lasting("reporting")


@pytest.mark.long
def test_the_second_is_refused_until_the_report_of_the_first_is_written(tmp_path, start):
    run = start(prepare=slow_report, epochs=1, max_steps=1)
    run.until(lambda: "reporting" in run.err)
    before = (tmp_path / "out" / f"{NAME}.pth").read_bytes()
    assert_refused(run_mmv(*tiny_data().train(tmp_path / "out"), "--overwrite"), tmp_path / "out")
    assert (tmp_path / "out" / f"{NAME}.pth").read_bytes() == before


@pytest.mark.long
def test_of_two_that_start_together_one_trains(tmp_path, start):
    runs = [start("--resume", prepare=slow_report, epochs=1, max_steps=2) for _ in range(2)]
    while all(run.alive for run in runs):
        time.sleep(0.05)
    loser, winner = sorted(runs, key=lambda run: run.alive)
    assert_refused(loser.wait(), tmp_path / "out")
    winner.until(lambda: "reporting" in winner.err)


@pytest.mark.long
def test_another_spelling_of_the_folder_is_the_same_folder(tmp_path, start):
    start(prepare=slow_loading).until(lambda: (tmp_path / "out" / LOCK).exists())
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert_refused(run_mmv(*tiny_data().train(tmp_path / "link")), tmp_path / "link")


@pytest.mark.long
def test_a_run_under_another_name_is_not_in_the_way(tmp_path, start):
    start(prepare=slow_loading).until(lambda: (tmp_path / "out" / LOCK).exists())
    ended = run_mmv(*tiny_data().train(tmp_path / "out", "sft", max_steps=1, init=sighted()))
    assert ended.code == 0, ended.err


@pytest.mark.long
def test_of_several_processes_the_first_holds_the_lock(tmp_path, start):
    run = start(gpus=2, batch_size=2, workers=0)
    run.until(lambda: "step 1/" in run.err)
    ended = run_mmv(*tiny_data().train(tmp_path / "out"), "--overwrite")
    assert_refused(ended, tmp_path / "out")
    assert f"(process {run.pid} on" in ended.error, "the launcher: it is the one to stop"


# --- not a moment longer ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_that_is_killed_is_in_nobodys_way(tmp_path, start):
    run = start().until(lambda: (tmp_path / "out" / f"{NAME}.pth").exists())
    run.send(signal.SIGKILL).wait()
    Lock(tmp_path / "out" / LOCK, {}, patience=0).release()
    ended = run_mmv(*tiny_data().train(tmp_path / "out", max_steps=4), "--overwrite")
    assert ended.code == 0, ended.err
    assert read_checkpoint(tmp_path / "out" / f"{NAME}.pth").stage == "pretrain"
    assert LOCK not in tree(tmp_path / "out")


@pytest.mark.long
def test_a_leader_that_is_killed_does_not_keep_the_others_from_starting_again(tmp_path, start, monkeypatch):
    monkeypatch.setenv(STEP, "4")
    monkeypatch.setenv(UNTIL, str(tmp_path / "never"))
    run = start("--max-restarts", "1", prepare=stay, gpus=2, batch_size=2, workers=1, epochs=1)
    run.until(lambda: "step 4/" in run.err)
    os.kill(workers_of(run)[0], signal.SIGKILL)
    ended = run.wait()
    assert ended.code == 0, ended.err
    assert "a process was lost: all processes have restarted" in ended.err


# --- the lock ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def child():
    """`child(target, *words)` is a forked process; it is killed at the end of the test."""
    started = []

    def begin(target, *args):
        process = multiprocessing.get_context("fork").Process(target=target, args=args)
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def hold_for_ever(path, held):
    Lock(path, {"process": os.getpid()})
    held.set()
    time.sleep(600)


@pytest.mark.long
def test_a_lock_is_held_until_its_process_is_killed(tmp_path, child):
    path, held = tmp_path / "new" / "lock", multiprocessing.get_context("fork").Event()
    process = child(hold_for_ever, path, held)
    held.wait(60)
    with pytest.raises(Held) as refused:
        Lock(path, {}, patience=0.2)
    assert refused.value.note == {"process": process.pid}
    process.kill()
    process.join()
    lock = Lock(path, {}, patience=0)
    assert lock.left == {"process": process.pid}
    lock.release()
    assert tree(tmp_path) == []


def test_nonsense_in_a_lock_that_was_left_stops_nobody(tmp_path):
    path = tmp_path / "lock"
    for nonsense in (b"[" * 60_000, b"\xff", b"{", b"[]", b""):
        path.write_bytes(nonsense)
        lock = Lock(path, {}, patience=0)
        assert lock.left == {}
        lock.release()


def test_a_lock_leaves_nothing_but_what_was_written(tmp_path):
    lock = Lock(tmp_path / "a" / "b" / "lock", {})
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock = Lock(tmp_path / "a" / "b" / "lock", {})
    write_text(tmp_path / "a" / "weights", "")
    lock.release()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "weights"]


def test_two_of_one_process_keep_each_other_out(tmp_path):
    lock = Lock(tmp_path / "lock", {})
    with pytest.raises(Held):
        Lock(tmp_path / "lock", {}, patience=0)
    lock.release()


@pytest.mark.long
def test_a_forked_child_neither_keeps_nor_releases_the_lock(tmp_path, child):
    lock = Lock(tmp_path / "lock", {})
    releasing = child(lock.release)
    releasing.join(60)
    with pytest.raises(Held):
        Lock(tmp_path / "lock", {}, patience=0)
    child(time.sleep, 600)
    lock.release()
    Lock(tmp_path / "lock", {}, patience=0).release()


def add_ones(path, lock):
    for _ in range(100):
        held = Lock(lock, {}, patience=60)
        number = int(path.read_text())
        time.sleep(0.0005)
        path.write_text(f"{number + 1}")
        held.release()


@pytest.mark.long
def test_a_lock_that_is_removed_with_each_release_is_never_held_twice(tmp_path, child):
    """The one who waits for a file that is removed must not take it for the lock."""
    (tmp_path / "number").write_text("0")
    for process in [child(add_ones, tmp_path / "number", tmp_path / "new" / "lock") for _ in range(3)]:
        process.join(120)
    assert (tmp_path / "number").read_text() == "300"


def test_a_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    ended = run_mmv(*tiny_data().train(tmp_path / "out", max_steps=1))
    assert ended.code == 0, ended.err
    assert (
        ended.err.count(
            f"{tmp_path / 'out'} is on a file system without locks: make sure that no other run writes there"
        )
        == 1
    )


def test_a_run_of_another_machine_that_has_not_ended_is_reported(tmp_path):
    """Where locks do not reach from machine to machine, nothing else shows that it is there."""
    write_text(tmp_path / "out" / LOCK, '{"process": 7, "host": "far-away", "since": "2020-01-02 03:04:05"}')
    ended = run_mmv(*tiny_data().train(tmp_path / "out", max_steps=1))
    assert ended.code == 0, ended.err
    assert "did not finish (process 7 on far-away, since 2020-01-02 03:04:05)" in ended.err


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        Lock(tmp_path / "file" / "new" / "lock", {})
    assert "file is a file, not a folder" in run_mmv(*tiny_data().train(tmp_path / "file" / "out")).error
