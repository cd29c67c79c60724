"""Data workers: if one of them ends, reading ends with a clear error instead of waiting for ever."""

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
from torch.utils.data import DataLoader, Dataset

from minimind_v.core.data.parcel import Parcel
from minimind_v.core.errors import MmvError, RunError
from minimind_v.core.processes import Parent, end_processes

SHM = Path("/dev/shm")
GRACE = 3.0  # seconds that all workers together may take to end


@dataclass(frozen=True)
class _Failure:
    """What ended a worker's work on an update. Of the error its words alone travel: not every error can."""

    place: str | None
    kind: type[MmvError] | None
    message: str


class Packed(Dataset[Parcel | _Failure]):
    """The updates of a plan as a worker sends them. What fails in it becomes part of the answer: nothing is lost."""

    def __init__(self, plan: Any) -> None:
        self.parent = Parent.current()  # before the plan: on its arrival in a spawned process, extensions are imported
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
            return _Failure(_place(self.plan, os.getpid()), RunError, reason)
        except Exception:
            return _Failure(_place(self.plan, os.getpid()), None, traceback.format_exc())


def affordable(workers: int, warn: Callable[[str], None]) -> int:
    """How many of so many workers can be started; `warn` is told where that is fewer."""
    fitting = _fitting(workers) if workers else 0
    if fitting < workers:
        instead = f"{fitting} of {workers} data workers" if fitting else "no data workers (as with --workers 0)"
        warn(f"{_shared_memory()} is enough for {instead}; if this is slow, start the container with --shm-size=1g")
    return fitting


def begin(loader: DataLoader[Any]) -> Any:
    """Start the workers.

    torch has a worker's end interrupt the program wherever it is, also in the middle of an update. It is enough to
    notice it when the next batch does not come, so torch's handler is taken back.

    A forked worker must free nothing that it has inherited: what lies on a GPU, or is pinned for one, cannot be freed
    in it, and the attempt ends the process. So garbage goes before, and what is there then is left alone.
    """
    heard = getattr(signal, "SIGCHLD", None)
    before = signal.getsignal(heard) if heard else None
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    except OSError as error:  # another process has taken the room meanwhile
        raise RunError(f"no data worker could be started ({error}): {_shared_memory()} — try --workers 0") from None
    finally:
        gc.unfreeze()
        if heard and threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(heard, before)


def unpacked(updates: Any, plan: Any, processes: list[Any]) -> Iterator[Any]:
    """What workers have packed. Raises RunError where one has ended, and what ended its work where it has not."""
    try:
        for parcel in updates:
            if isinstance(parcel, _Failure):
                where = f" at {parcel.place}" if parcel.place else ""
                if parcel.kind is None:
                    raise RuntimeError(f"a data worker failed{where}\n{parcel.message}")
                raise parcel.kind(f"a data worker failed{where}: {parcel.message}" if where else parcel.message)
            yield parcel.open() if isinstance(parcel, Parcel) else parcel
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise _died(plan, processes, error) from None


def _died(plan: Any, processes: list[Any], error: Exception) -> RunError:
    """Which worker has ended, by what and at which row."""
    ending = connection.wait([process.sentinel for process in processes], 1)  # perhaps it is about to
    for process in processes:
        if process.sentinel not in ending:
            continue
        process.join(5)
        if process.exitcode is None:
            continue
        place = _place(plan, process.pid)
        ended = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit code {process.exitcode}"
        advice = {
            "SIGKILL": "check that row; if memory is short, try fewer workers or --workers 0",
            "SIGBUS": f"a file was truncated while it was read, or shared memory is full: {_shared_memory()}; "
            f"start the "
            "container with --shm-size=1g, or try --workers 0",
        }.get(ended, "check that row, or try --workers 0")
        return RunError(f"a data worker died of {ended}{f' at {place}' if place else ''} — {advice}")
    return RunError(f"a batch of a data worker did not arrive ({error}) — try --workers 0")


def _place(plan: Any, process: int) -> str | None:
    return plan.read_by(process) if hasattr(plan, "read_by") else None


def end(updates: Any, processes: list[Any]) -> None:
    """End the workers, also those that hang in a decoder or wait for a dead network disk.

    torch would give each of them ten seconds, one after the other, and the interpreter at its end wait for ever.
    """
    if processes:
        _ask(updates)
        stuck = end_processes(processes, GRACE)
        updates._workers = [process for process in processes if process not in stuck]
    getattr(updates, "_shutdown_workers", lambda: None)()


def _ask(updates: Any) -> None:
    """What torch's own shutdown asks of its thread and of its workers, in its order, without waiting for these."""
    if thread := getattr(updates, "_pin_memory_thread", None):
        updates._pin_memory_thread_done_event.set()
        updates._worker_result_queue.put((None, None))
        thread.join(GRACE)
        if thread.is_alive():  # it reads what a worker has begun to send
            del updates._pin_memory_thread
    updates._workers_done_event.set()
    for number, available in enumerate(updates._workers_status):
        if available:
            updates._mark_worker_as_unavailable(number, shutdown=True)


# --- what /dev/shm is still needed for --------------------------------------------------------------------------------


def semaphores(wanted: int) -> int:
    """For how many of so many semaphores there is room; each takes a page in /dev/shm. They are given back."""
    taken: list[Any] = []
    with suppress(OSError):  # no room, or no shared memory at all
        while len(taken) < wanted:
            taken.append(get_context().Lock())
    return len(taken)


def _fitting(workers: int) -> int:
    """For how many of so many data workers there is room, where other processes of the run want as many."""
    runs = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, (semaphores(runs * (3 * workers + 8)) // runs - 8) // 3)  # so many has torch's DataLoader


def _shared_memory() -> str:
    """How much shared memory this system has."""
    try:
        disk = os.statvfs(SHM)
    except OSError:
        return f"there is no {SHM}"
    size, free = disk.f_blocks * disk.f_frsize >> 10, disk.f_bavail * disk.f_frsize >> 10
    return f"{SHM} has {size:,} KB, {free:,} KB of it free"


class Whereabouts:
    """The process of each worker and the row that it is at, in memory that forked workers share."""

    def __init__(self) -> None:
        self._table = np.frombuffer(mmap.mmap(-1, 1024), np.int64).reshape(-1, 2)

    def note(self, worker: int, row: int) -> None:
        if worker < len(self._table):
            self._table[worker] = os.getpid(), row

    def row_of(self, process: int) -> int | None:
        """The row that a process was at; None where it has read none."""
        return next((row for pid, row in self._table.tolist() if pid == process), None)

    def __reduce__(self) -> tuple[type[Whereabouts], tuple[()]]:
        return Whereabouts, ()  # a process that is not forked has one of its own
