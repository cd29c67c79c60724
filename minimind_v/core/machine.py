"""The cores and memory of this machine; an error names the option to lower."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from minimind_v.core.errors import UsageError

PROCESSES_PER_CORE = 4  # more only wait for each other's cores and take memory
FEWEST = {"workers": 32, "processes": 8}  # allowed even on a small machine: workers on a slow disk only wait


def check_workers(workers: int) -> None:
    """Raises UsageError for more `--workers` than the cores of this machine can use."""
    _refuse_more("--workers", workers, "workers")


def check_processes(processes: int) -> None:
    """Raises UsageError for more training processes on the CPU than its cores can use."""
    _refuse_more("--gpus", processes, "processes")


def _refuse_more(option: str, asked: int, what: str) -> None:
    cores = os.cpu_count() or 1
    most = max(FEWEST[what], PROCESSES_PER_CORE * cores)
    if asked > most:
        raise UsageError(f"{option} must be at most {most} on this machine, which has {cores} cores, not {asked}")


def total_memory() -> int | None:
    """The memory of this machine in bytes, or the process limit if it is lower; None if unknown."""
    sizes: list[int] = []
    with contextlib.suppress(ValueError, OSError, AttributeError):  # Windows
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if sys.platform != "win32":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        sizes += [] if limit == resource.RLIM_INFINITY else [limit]
    with contextlib.suppress(OSError, ValueError):  # `max`: no limit
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(sizes, default=None)
