"""What this machine can hold, checked before a run takes memory or processes; an error names the key to lower."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from minimind_v.core.config.schema import RunConfig, TextConfig
from minimind_v.core.errors import UsageError

FLOAT = 4  # bytes of a weight while it is trained
PROCESSES_PER_CORE = 4  # more of them wait for each other's cores, and each takes memory of its own
FEWEST = {"workers": 32, "processes": 8}  # that even a small machine may be asked for: those of a slow disk wait


def check_machine(config: RunConfig) -> None:
    """Raises UsageError where a run asks for more data workers or weights than this machine can hold."""
    check_workers(config.data.workers)
    check_memory(config.model)


def check_workers(workers: int) -> None:
    """Raises UsageError for more `--workers` than the cores of this machine can make use of."""
    _refuse_more("--workers", workers, "workers")


def check_processes(processes: int) -> None:
    """Raises UsageError for more training processes on the CPU than its cores can make use of."""
    _refuse_more("--gpus", processes, "processes")


def check_memory(model: TextConfig) -> None:
    """Raises UsageError where the weights of a model alone need more memory than this machine, or its limit, has."""
    needed, there = model.parameters * FLOAT, total_memory()
    if there is not None and needed > there:
        raise UsageError(
            f"model.hidden_size {model.hidden_size:,}, model.num_hidden_layers {model.num_hidden_layers:,} and "
            f"model.vocab_size {model.vocab_size:,} make a model of {model.parameters:,} parameters, which takes "
            f"{needed / 2**30:,.1f} GiB, and this machine has {there / 2**30:,.1f} GiB — lower them, or take a --preset"
        )


def _refuse_more(option: str, asked: int, what: str) -> None:
    cores = os.cpu_count() or 1
    most = max(FEWEST[what], PROCESSES_PER_CORE * cores)
    if asked > most:
        raise UsageError(f"{option} must be at most {most} on this machine, which has {cores} cores, not {asked}")


def total_memory() -> int | None:
    """Bytes of memory that this machine has, or fewer where the system sets this process a limit; None: not known."""
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
