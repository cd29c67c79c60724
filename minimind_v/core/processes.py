"""Processes that do not outlive the one that started them, and whose end nobody waits for in vain."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.process
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from minimind_v.core.extensions import load_extensions

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when the thread that started it ends
LOOK = 0.5  # seconds between two checks whether the parent is alive, where the system sends no signal
KILLED = 2.0  # seconds that a killed process may take; one that waits for a dead network disk takes for ever


@dataclass(frozen=True)
class Parent:
    """The process that starts others: it sends them `Parent.here()`, and each calls `end_with_it()` first."""

    pid: int
    lasting: bool = True  # whether the thread that starts them is there as long as the process

    @classmethod
    def here(cls) -> Parent:
        """Return the process that calls."""
        return cls(os.getpid(), threading.current_thread() is threading.main_thread())

    def end_with_it(self) -> None:
        """End this process when its parent has ended, by whatever; at once where that has happened already."""
        signalled = self.lasting and _ask_for_signal()
        if os.getppid() != self.pid:  # it may have ended before the system was asked
            os._exit(1)
        if not signalled:
            threading.Thread(target=self._watch, name="parent", daemon=True).start()

    def __reduce__(self) -> tuple[object, ...]:
        """On arrival in a process that was spawned it takes effect: what is imported there next may take seconds."""
        return _arrived, (self.pid, self.lasting)

    def _watch(self) -> None:
        while os.getppid() == self.pid:
            time.sleep(LOOK)
        os._exit(1)


def _arrived(pid: int, lasting: bool) -> Parent:
    parent = Parent(pid, lasting)
    if os.getpid() != pid:
        parent.end_with_it()
        load_extensions()  # before what follows is read: it may hold objects of their classes
    return parent


def _ask_for_signal() -> bool:
    """Whether the system will kill this process when its parent ends."""
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):
        return int(ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)) == 0
    return False


@contextlib.contextmanager
def held_back(signals: Iterable[int]) -> Iterator[None]:
    """Call the handlers of signals at the end only. They run in the main thread, whichever thread the system chose."""
    before: dict[int, Any] = {}
    held: list[int] = []
    try:
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                if (handler := signal.getsignal(number)) is None:  # not one of Python's
                    continue
                before[number] = handler
                signal.signal(number, lambda number, _: held.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


def end_processes(processes: Iterable[BaseProcess], grace: float = 0.0) -> list[BaseProcess]:
    """Give processes so many seconds to end, and kill those that have not.

    Returns those that even that does not end, as the system waits for a disk in their name: nobody waits for them, not
    even the interpreter at its end.
    """
    _wait(alive := _alive(processes), grace)
    for process in (alive := _alive(alive)):
        process.kill()
    _wait(alive, KILLED)
    for process in (alive := _alive(alive)):
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    return alive


def _alive(processes: Iterable[BaseProcess]) -> list[BaseProcess]:
    return [process for process in processes if process.is_alive()]


def _wait(processes: list[BaseProcess], seconds: float) -> None:
    end = time.monotonic() + seconds
    while processes and (left := end - time.monotonic()) > 0:
        connection.wait([process.sentinel for process in processes], left)
        processes = _alive(processes)
