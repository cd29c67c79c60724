"""Share the CPU with other processes: a thread that waits for a core must not keep one busy.

torch's CPU threads wait for each other at the end of every operator. With GNU's OpenMP they spin while they wait, which
is fastest while every thread has its own core. Beside another busy process one of them has none: the others spin away
the time that it needs, and a small model trains ten times slower, or worse.

OpenMP hardly spins if it knows of more threads than cores. So while other processes need the cores, an idle thread
holds a second team of threads. The number of threads per operator stays the same, and so does every bit of its result.
Measured on two cores at the demo's size, samples per second: 53 alone and 7 beside a busy process while spinning, 33
and 30 without.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

INTERVAL = 0.25  # seconds between two samples of how busy the cores are
CROWDED = 0.3  # of a core, used by others beyond those that our threads leave free
BUSY = 2  # busy samples in a row before threads hardly spin: a short burst of another process is not worth it
QUIET = 4  # quiet samples in a row before they spin again

_started = threading.Lock()


def share_cpu() -> None:
    """Start to watch whether other processes need the cores of this one, until it ends; a second call does nothing.

    Does nothing where OpenMP is not GNU's, or where the system does not report the use of its cores.
    """
    if not _started.acquire(blocking=False):
        return
    if torch.get_num_threads() > 1 and _is_gnu() and CpuUse().sample() is not None:
        threading.Thread(target=_watch, name="cpu-sharing", daemon=True).start()


def _is_gnu() -> bool:
    """Whether GNU's OpenMP is loaded."""
    with suppress(OSError):
        return "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return False


class CpuUse:
    """How busy other processes keep the cores that this process may use, from Linux's counters (ticks of 10 ms)."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        self.root = root
        self._ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
        self._then: tuple[float, float, float] | None = None  # time, seconds of all, seconds of ours

    def sample(self) -> float | None:
        """Cores used by other processes since the last sample; 0 at first, None if unknown."""
        try:
            now = time.monotonic(), self._used_by_all(), self._used_by_us()
        except (OSError, ValueError, IndexError):
            return None
        then, self._then = self._then or now, now
        passed, everyone, ours = (after - before for after, before in zip(now, then, strict=True))
        return max(0.0, (everyone - max(ours, 0.0)) / passed) if passed else 0.0

    def _used_by_all(self) -> float:
        """Busy seconds of our cores, including steal time of other virtual machines."""
        cores, busy = our_cores(), 0
        for line in (self.root / "stat").read_text(encoding="ascii").splitlines():
            name, *counts = line.split()
            if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
                user, nice, system, _, _, irq, soft, steal = map(int, counts[:8])
                busy += user + nice + system + irq + soft + steal
        return busy / self._ticks

    def _used_by_us(self) -> float:
        """CPU seconds of this process, its threads and its living children, such as data workers."""
        children: list[str] = []
        for task in (self.root / "self/task").iterdir():
            with suppress(OSError):  # a thread that has ended meanwhile
                children += (task / "children").read_text(encoding="ascii").split()
        used = self._used(self.root / "self/stat")
        for child in children:
            with suppress(OSError):
                used += self._used(self.root / child / "stat")
        return used

    def _used(self, path: Path) -> float:
        fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()  # names have blanks
        return (int(fields[11]) + int(fields[12])) / self._ticks


class SecondTeam:
    """A thread that holds a second team of OpenMP threads until it is released."""

    def __init__(self) -> None:
        self._leave: threading.Event | None = None

    def hold(self) -> None:
        """Make threads hardly spin."""
        if self._leave is None:
            self._leave = threading.Event()
            threading.Thread(target=self._stay, args=(self._leave,), name="cpu-sharing-team", daemon=True).start()

    def leave(self) -> None:
        """Make them spin again."""
        if self._leave is not None:
            self._leave.set()
            self._leave = None

    @staticmethod
    def _stay(leave: threading.Event) -> None:
        torch.zeros(1 << 17).add_(1)  # large enough for all threads: they are this thread's team until it ends
        leave.wait()


def _watch() -> None:
    use, team, alike = CpuUse(), SecondTeam(), 0  # equal samples in a row, below 0 where the cores are free
    use.sample()
    while True:
        time.sleep(INTERVAL)
        other_use = use.sample()
        if other_use is None:
            team.leave()
            return
        alike = max(alike, 0) + 1 if crowded(other_use) else min(alike, 0) - 1
        if alike >= BUSY:
            team.hold()
        elif alike <= -QUIET:
            team.leave()


def crowded(other_use: float) -> bool:
    """Return whether the threads of this process and the use by others exceed the cores."""
    threads = torch.get_num_threads()
    return threads > 1 and other_use > CROWDED and threads + other_use > len(our_cores()) + CROWDED / 2


def our_cores() -> set[int]:
    """Return the numbers of the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
