"""Threads hardly spin while others need the cores, and spin again afterwards; no bit of a result depends on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimind_v.core import cpu_sharing
from minimind_v.core.cpu_sharing import CpuUse, crowded

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(not CORES, reason="only Linux tells who uses the cores")

WATCHED = """
import threading, time, torch
from minimind_v.core import cpu_sharing

def held():
    return any(thread.name == "cpu-sharing-team" for thread in threading.enumerate())

def until(wanted, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end and held() != wanted:
        time.sleep(0.05)
    return held() == wanted

def results():
    torch.manual_seed(0)
    x, w = torch.randn(1600, 128), torch.randn(384, 128)
    return [(x @ w.t()).sum(), torch.nn.functional.silu(x).sum(dim=0), x.softmax(-1).norm()]

torch.set_num_threads(2)
before, load = results(), [1.0]
cpu_sharing.share_cpu()
cpu_sharing.share_cpu()
print("watchers", sum(thread.name == "cpu-sharing" for thread in threading.enumerate()))
cpu_sharing.CpuUse.sample = lambda self: load[0]
cpu_sharing.crowded = lambda others: others > 0.3
print("noticed", until(True, 20))
print("same bits", all(torch.equal(a, b) for a, b in zip(before, results())))
load[0] = 0.0
print("gone", until(False, 20))
"""


@pytest.fixture
def proc(tmp_path):
    """A folder like /proc that tells what is written into it, in ticks."""
    (tmp_path / "self/task/7").mkdir(parents=True)
    (tmp_path / "99").mkdir()

    def write(busy, ours, child=0, elsewhere=0, steal=0):
        lines = ["cpu  1 2 3 4 5 6 7 8 9 10"]
        lines += [f"cpu{core} {busy} 0 0 999 0 0 0 {steal} 0 0" for core in CORES]
        lines += [f"cpu{max(CORES) + 1} {elsewhere} 0 0 0 0 0 0 0 0 0", "intr 1 2 3"]
        (tmp_path / "stat").write_text("\n".join(lines))
        fields = " ".join(["0"] * 10)
        (tmp_path / "self/stat").write_text(f"5 (a (b) c) S {fields} {ours} 0 0 0")
        (tmp_path / "99/stat").write_text(f"99 (worker) S {fields} 0 {child} 0 0")
        (tmp_path / "self/task/7/children").write_text("99 ")

    write(0, 0)
    return tmp_path, write


def test_others_are_what_neither_we_nor_our_workers_used(proc, monkeypatch):
    root, write = proc
    clock = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(cpu_sharing.time, "monotonic", lambda: next(clock))
    use, cores, ticks = CpuUse(root), len(CORES), os.sysconf("SC_CLK_TCK")
    assert use.sample() == 0
    write(ticks, ours=ticks // 2, child=ticks // 4, elsewhere=50 * ticks)
    assert use.sample() == pytest.approx(cores - 0.75), "other cores than ours are nobody's business here"
    write(ticks, ours=ticks // 2, child=ticks // 4)
    assert use.sample() == 0
    write(ticks, ours=ticks // 2, child=ticks // 4, steal=ticks // 2)
    assert use.sample() == pytest.approx(cores / 2), "a virtual machine's neighbours count"


def test_a_system_that_does_not_report_is_left_alone(tmp_path):
    assert CpuUse(tmp_path).sample() is None


@pytest.mark.parametrize(
    ("threads", "cores", "others", "answer"),
    [
        (2, 2, 0.1, False),
        (2, 2, 0.5, True),
        (2, 2, 3.0, True),
        (1, 2, 3.0, False),  # who is alone waits for nobody
        (8, 16, 4.0, False),  # there are cores for all
        (8, 16, 9.0, True),
    ],
)
def test_crowded(threads, cores, others, answer, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert crowded(others) is answer


@pytest.mark.long
def test_a_busy_process_is_noticed_and_its_end_too_and_every_bit_stays(tmp_path):
    """In a process of its own; what others use is told to it, since this machine is never quiet while tests run."""
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(root)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["watchers 1", "noticed True", "same bits True", "gone True"]
