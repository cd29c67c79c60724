"""Data workers: if one dies, reading ends with a clear error and does not wait for ever."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from minimind_v.core.data.parcel import Parcel
from minimind_v.core.errors import MmvError, RunError
from minimind_v.core.extensions import error_of_extension
from minimind_v.core.processes import Parent, end_processes

SHM = Path("/dev/shm")
GRACE = 3.0  # seconds that all workers together may take to end


@dataclass(frozen=True)
class _Failure:
    """The error that ended a worker's step, as text: not every exception can be pickled."""

    location: str | None
    kind: type[MmvError] | None
    message: str


class Packed(Dataset[Parcel | _Failure]):
    """The steps of a plan as a worker sends them: a parcel, or the error, which torch could lose."""

    def __init__(self, plan: Any) -> None:
        self.parent = (
            Parent.current()
        )  # before the plan: a spawned process imports extensions when it unpickles the plan
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> Parcel | _Failure:
        try:
            return Parcel(self.plan[number])
        except MmvError as error:
            return _Failure(None, type(error), str(error))
        except (OSError, MemoryError) as error:
            reason = f"{str(error) or 'out of memory'} — try fewer workers, or --workers 0"
            return _Failure(_location_of(self.plan, os.getpid()), RunError, reason)
        except Exception as error:
            extension = error_of_extension(error)
            kind, message = (RunError, str(extension)) if extension else (None, traceback.format_exc())
            return _Failure(_location_of(self.plan, os.getpid()), kind, message)


def affordable(workers: int, warn: Callable[[str], None]) -> int:
    """The number of workers, up to `workers`, that have room to start; warns if they are fewer."""
    allowed = _room_for(workers) if workers else 0
    if allowed < workers:
        instead = f"{allowed} of {workers} data workers" if allowed else "no data workers (as with --workers 0)"
        warn(f"{_shared_memory()}: enough for {instead}; if this is slow, start the container with --shm-size=1g")
    return allowed


def begin(loader: DataLoader[Any]) -> Any:
    """Start the workers.

    torch's signal handler interrupts the program when a worker dies, also in the middle of a step. `unpacked` reports
    the death when the next batch does not arrive, so the old handler is set again.

    A forked worker must not free inherited memory of a GPU, or pinned for one: the attempt ends the process. So where
    there is a GPU garbage is collected before, for a tenth of a second, and all other objects are frozen.
    """
    sigchld = getattr(signal, "SIGCHLD", None)
    before = signal.getsignal(sigchld) if sigchld else None
    if torch.cuda.is_initialized():
        gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    except OSError as error:  # another process took the room
        raise RunError(f"no data worker could be started ({error}): {_shared_memory()} — try --workers 0") from None
    finally:
        gc.unfreeze()
        if sigchld and threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(sigchld, before)


def unpacked(parcels: Any, plan: Any, processes: list[Any]) -> Iterator[Any]:
    """The opened parcels. Raises RunError if a worker died, or the error that ended its step."""
    try:
        for parcel in parcels:
            if isinstance(parcel, _Failure):
                location = f" at {parcel.location}" if parcel.location else ""
                if parcel.kind is None:
                    raise RuntimeError(f"a data worker failed{location}\n{parcel.message}")
                raise parcel.kind(f"a data worker failed{location}: {parcel.message}" if location else parcel.message)
            yield parcel.open() if isinstance(parcel, Parcel) else parcel
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise _died(plan, processes, error) from None


def _died(plan: Any, processes: list[Any], error: Exception) -> RunError:
    """The error for a dead worker: its signal or exit code, and its row."""
    ending = connection.wait([process.sentinel for process in processes], 1)  # it may be about to end
    for process in processes:
        if process.sentinel not in ending:
            continue
        process.join(5)
        if process.exitcode is None:
            continue
        location = _location_of(plan, process.pid)
        ended = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit code {process.exitcode}"
        advice = {
            "SIGKILL": "check that row; if memory is short, try fewer workers or --workers 0",
            "SIGBUS": f"a file was truncated while it was read, or shared memory is full: {_shared_memory()}; "
            "start the container with --shm-size=1g, or try --workers 0",
        }.get(ended, "check that row, or try --workers 0")
        return RunError(f"a data worker died of {ended}{f' at {location}' if location else ''} — {advice}")
    return RunError(f"a batch of a data worker did not arrive ({error}) — try --workers 0")


def _location_of(plan: Any, process: int) -> str | None:
    return plan.read_by(process) if hasattr(plan, "read_by") else None


def end(iterator: Any, processes: list[Any]) -> None:
    """End the workers, even if they hang in a decoder or wait for a dead network disk.

    torch would wait ten seconds for each, one after another, and the interpreter at its end for ever.
    """
    if processes:
        _ask(iterator)
        stuck = end_processes(processes, GRACE)
        iterator._workers = [process for process in processes if process not in stuck]
    getattr(iterator, "_shutdown_workers", lambda: None)()


def _ask(iterator: Any) -> None:
    """Ask torch's thread and workers to end, in the order of its own shutdown, without waiting for the workers."""
    if thread := getattr(iterator, "_pin_memory_thread", None):
        iterator._pin_memory_thread_done_event.set()
        iterator._worker_result_queue.put((None, None))
        thread.join(GRACE)
        if thread.is_alive():  # it is reading from a worker
            del iterator._pin_memory_thread
    iterator._workers_done_event.set()
    for number, available in enumerate(iterator._workers_status):
        if available:
            iterator._mark_worker_as_unavailable(number, shutdown=True)


# --- room in /dev/shm -------------------------------------------------------------------------------------------------


def semaphores(count: int) -> int:
    """The number of semaphores, up to `count`, that have room; each takes a page in /dev/shm. All are freed."""
    locks: list[Any] = []
    with suppress(OSError):  # no room, or no shared memory at all
        while len(locks) < count:
            locks.append(get_context().Lock())
    return len(locks)


def _room_for(workers: int) -> int:
    """The number of data workers, up to `workers`, that have room if each process of the run starts as many."""
    runs = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, (semaphores(runs * (3 * workers + 8)) // runs - 8) // 3)  # semaphores of torch's DataLoader


def _shared_memory() -> str:
    """The size and free bytes of shared memory, as text."""
    try:
        disk = os.statvfs(SHM)
    except OSError:
        return f"there is no {SHM}"
    size, free = disk.f_blocks * disk.f_frsize >> 10, disk.f_bavail * disk.f_frsize >> 10
    return f"{SHM} has {size:,} KB, {free:,} KB of it free"


class CurrentRows:
    """The process of each worker and its current row, in memory that forked workers share."""

    def __init__(self) -> None:
        self._table = np.frombuffer(mmap.mmap(-1, 1024), np.int64).reshape(-1, 2)

    def note(self, worker: int, row: int) -> None:
        if worker < len(self._table):
            self._table[worker] = os.getpid(), row

    def row_of(self, process: int) -> int | None:
        """The current row of a process; None if it has read none."""
        return next((row for pid, row in self._table.tolist() if pid == process), None)

    def __reduce__(self) -> tuple[type[CurrentRows], tuple[()]]:
        return CurrentRows, ()  # a spawned process has its own
