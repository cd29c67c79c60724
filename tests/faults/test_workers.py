"""Data workers that fail, in every way that one can: the run ends with the reason, and never waits for ever."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from minimind_v.core.data.dataset import RowDataset
from minimind_v.core.data.loader import load_batches, load_steps
from minimind_v.core.errors import DataError, RunError
from tests.cli.harness import SIGHT, Running, read_rows, run_mmv, tiny_data

NAME = "pretrain_vlm_128"


# --- a container with little shared memory ----------------------------------------------------------------------------


SIZE = "TEST_SIZE"  # the variable that names the kilobytes of a container's shared memory
CLONE_NEWNS = 0x20000  # Linux: the mounts are those of this process alone
MOUNT = "mount --make-rprivate / && mount -t tmpfs -o size=${TEST_SIZE}k tmpfs /dev/shm"


def enter_container():
    """Give this process, and those that it starts, a small /dev/shm of their own."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["sh", "-c", MOUNT], check=True)


@pytest.fixture
def container(tmp_path, monkeypatch):
    """`container(size, *words)` is `mmv` with a /dev/shm of so many kilobytes; skips where none can be mounted."""
    monkeypatch.setenv(SIZE, "64")
    try:
        mounted = subprocess.run(["unshare", "-m", "sh", "-c", MOUNT], capture_output=True, check=False)
    except FileNotFoundError:
        mounted = None
    if mounted is None or mounted.returncode:
        pytest.skip("no small /dev/shm can be mounted here")

    def run(size, *options, afresh=False):
        monkeypatch.setenv(SIZE, str(size))
        return Running(tmp_path / "container", *options, prepare=enter_container, afresh=afresh).wait()

    return run


def losses(out):
    return [record["loss"] for record in read_rows(out / NAME / "metrics.jsonl")]


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (64, {"workers": 2}, None),
        (64, {"workers": 4}, "/dev/shm has 64 KB, 64 KB of it free: enough for 2 of 4 data workers"),
        (16, {"workers": 2}, "/dev/shm has 16 KB, 16 KB of it free: enough for no data workers (as with --workers 0)"),
        (64, {"workers": 2, "gpus": 2, "batch_size": 2}, "enough for no data workers"),
    ],
)
def test_a_run_continues_with_as_many_workers_as_shared_memory_allows(tmp_path, container, size, changes, message):
    """Batches are larger than all of the shared memory: 4 pictures of 64² are 49 KB, and 4 steps are under way."""
    several = "gpus" in changes  # in one container: the first of them enters it before it starts the others
    ended = container(size, *tiny_data().train(tmp_path / "out", **changes), afresh=several)
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert ended.err.count("/dev/shm") == (1 if message else 0), ended.err
    if message:
        assert message in ended.err
        assert "--shm-size" in ended.err
    if not several:
        assert run_mmv(*tiny_data().train(tmp_path / "alone", workers=0)).code == 0
        assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("command", ["check", "stats"])
def test_rows_are_counted_without_shared_memory(container, command):
    args = ("data", command, tiny_data().data("pretrain"), "--images", tiny_data().images("pretrain"))
    ended = container(4, *args, *SIGHT)
    assert ended.code == 0, ended.err
    assert "40" in ended.out + ended.err


# --- a worker that ends -----------------------------------------------------------------------------------------------


def only_in_a_worker(ends):
    """Let the third picture that a data worker loads be its last deed."""
    real, loaded, main = RowDataset.load, [], os.getpid()

    def load(dataset, example):
        loaded.append(example)
        if len(loaded) > 10 and os.getpid() != main:
            ends()
        return real(dataset, example)

    RowDataset.load = load


def bus_error():
    only_in_a_worker(lambda: os.kill(os.getpid(), signal.SIGBUS))


def no_memory_left():
    only_in_a_worker(lambda: os.kill(os.getpid(), signal.SIGKILL))


def exit_in_silence():
    only_in_a_worker(lambda: os._exit(0))


@pytest.mark.long
@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (bus_error, "a data worker died of SIGBUS at {data}:"),
        (no_memory_left, "a data worker died of SIGKILL at {data}:"),
        (exit_in_silence, "a data worker died of exit code 0 at {data}:"),
    ],
)
def test_a_worker_that_ends_before_its_time_ends_the_run(tmp_path, prepare, message):
    run = Running(tmp_path, *tiny_data().train(tmp_path / "out", workers=2, epochs=100), prepare=prepare)
    ended = run.wait()
    assert ended.code == 1
    assert message.format(data=tiny_data().data("pretrain")) in ended.error
    assert "--workers 0" in ended.error
    assert not run.left_behind()
    resumed = run_mmv(
        *tiny_data().train(tmp_path / "out", workers=0, epochs=100, max_steps=3), "--resume", "--allow", "max_steps"
    )
    assert resumed.code == 0, resumed.err


class Numbers:
    """A plan of numbers, one of which a worker cannot make."""

    prefetch = 2

    def __init__(self, fails):
        self.fails, self.main = fails, os.getpid()

    def __len__(self):
        return 12

    def __getitem__(self, number):
        if number == 7 and os.getpid() != self.main:
            self.fails()
        return [torch.tensor(number)]


def raises(error):
    def fail():
        raise error

    return fail


def raise_what_cannot_travel():
    class Here(Exception):
        """Of a class that no other process can find."""

    raise Here("somewhere in a worker")


@pytest.mark.parametrize(
    ("fails", "kind", "message"),
    [
        (raises(ValueError("five")), RuntimeError, "ValueError: five"),
        (raise_what_cannot_travel, RuntimeError, "somewhere in a worker"),
        (raises(OSError(28, "No space left on device")), RunError, r"No space left on device — try .*--workers 0"),
        (raises(MemoryError()), RunError, r"out of memory — try .*--workers 0"),
        (raises(DataError("file.jsonl: cut while it was read")), DataError, "^file.jsonl: cut while it was read$"),
        (raises(SystemExit(3)), RunError, "died of exit code"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), RunError, "died of SIGSEGV"),
    ],
)
def test_a_batch_that_is_lost_ends_the_reading(fails, kind, message):
    got = []
    with pytest.raises(kind, match=message):
        got.extend(map(int, load_batches(Numbers(fails), 2)))
    assert got == list(range(len(got)))


@pytest.mark.long
def test_the_end_of_a_worker_does_not_interrupt_a_step():
    """It may be in the middle of one; torch would raise there."""
    before = signal.getsignal(signal.SIGCHLD)

    def die():
        time.sleep(0.5)  # by then its earlier answers have left it
        os.kill(os.getpid(), signal.SIGKILL)

    steps = load_steps(Numbers(die), 2)
    for number in range(7):
        assert next(steps) == [torch.tensor(number)]
    time.sleep(0.5)  # here it ends
    assert signal.getsignal(signal.SIGCHLD) == before
    with pytest.raises(RunError, match="SIGKILL"):
        next(steps)


# --- signals to a run that waits --------------------------------------------------------------------------------------


def wait_for_ever():
    """Let rows stop coming after a few updates, from workers and in the process itself."""
    real, loaded = RowDataset.load, []

    def load(dataset, example):
        loaded.append(example)
        if len(loaded) > 12:
            print("waiting", file=sys.stderr, flush=True)
            while True:
                time.sleep(600)
        return real(dataset, example)

    RowDataset.load = load


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "code", "changes"),
    [
        (signal.SIGTERM, 143, {"workers": 2}),
        (signal.SIGINT, 130, {"workers": 0}),
        (signal.SIGTERM, 143, {"workers": 1, "gpus": 2, "batch_size": 2}),
    ],
)
def test_a_signal_ends_a_run_that_waits_for_data(tmp_path, number, code, changes):
    line = {"epochs": 3, "log_every": 1} | changes
    run = Running(tmp_path, *tiny_data().train(tmp_path / "out", **line), prepare=wait_for_ever)
    run.until(lambda: "waiting" in run.err and "step 3/" in run.err)
    time.sleep(1)
    ended = run.send(number).wait()
    assert ended.code == code, ended.err
    assert f"stopped by {number.name} after " in ended.err
    assert not run.left_behind()
    done = len(losses(tmp_path / "out"))
    again = run_mmv(
        *tiny_data().train(tmp_path / "out", **line | {"workers": 0, "gpus": 1, "batch_size": 4}), "--resume"
    )
    assert again.code == 0, again.err
    assert f"resuming after step {done} of 30" in again.err
    assert len(losses(tmp_path / "out")) == 30


def wait_at_once():
    """Let no row ever come."""
    RowDataset.load = lambda *_: time.sleep(600)
    print("waiting", file=sys.stderr, flush=True)


@pytest.mark.long
def test_a_signal_before_the_first_batch_is_no_error_of_the_data(tmp_path):
    run = Running(tmp_path, *tiny_data().train(tmp_path / "out", workers=1), prepare=wait_at_once)
    run.until(lambda: "1 epoch" in run.err)
    time.sleep(1)
    ended = run.send(signal.SIGTERM).wait()
    assert ended.code == 143, ended.err
    assert "stopped by SIGTERM after 0 steps; nothing saved yet" in ended.err
    assert not (tmp_path / "out" / f"{NAME}.pth").exists()


# --- the parcel -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["memfd", "pipe"])
def memory(request, monkeypatch):
    """With memory files, and on a system that has none."""

    def refuse(_):
        raise OSError(1, "Operation not permitted")

    if not request.param:
        monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("no memory files here")


class Things(Numbers):
    """Tensors of every kind, among other things."""

    def __getitem__(self, number):
        wide = torch.arange(24).reshape(4, 6)
        return [
            {
                "scalar": torch.tensor(number),
                "empty": torch.empty(0, 3, dtype=torch.bool),
                "columns": wide[:, ::2],
                "half": torch.full((3,), 0.1).to(torch.bfloat16),
                "mask": torch.tensor([True, False, True]),
                "bytes": torch.arange(5, dtype=torch.uint8),
                "words": ["ä", b"\0" * 70],
                "none": None,
            }
        ]


@pytest.mark.usefixtures("memory")
def test_what_is_opened_is_what_was_packed():
    plan = Things(None)
    for number, parcel in enumerate(load_batches(plan, 2)):
        expected = plan[number][0]
        assert parcel.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert parcel[key].dtype == value.dtype
                assert torch.equal(parcel[key], value)
                parcel[key].zero_()  # may be written to
            else:
                assert parcel[key] == value
    assert number == 11
