"""Child processes: they end with their parent, and the parent never waits for one without a limit."""

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

PR_SET_PDEATHSIG = 1  # Linux: the signal to a process when the thread that started it ends
CHECK_INTERVAL = 0.5  # seconds between two checks whether the parent is alive, where the system sends no signal
KILLED = 2.0  # seconds that a killed process may take; one that waits for a dead network disk never ends


@dataclass(frozen=True)
class Parent:
    """A process that starts others: it passes `Parent.current()` to them, and each calls `end_with_it()` first."""

    pid: int
    lasting: bool = True  # whether the thread that starts them lives as long as the process

    @classmethod
    def current(cls) -> Parent:
        """Return the calling process."""
        return cls(os.getpid(), threading.current_thread() is threading.main_thread())

    def end_with_it(self) -> None:
        """End this process when its parent ends for any reason; at once where the parent has ended already."""
        signalled = self.lasting and _ask_for_signal()
        if os.getppid() != self.pid:  # it may have ended before the system was asked
            os._exit(1)
        if not signalled:
            threading.Thread(target=self._watch, name="parent", daemon=True).start()

    def __reduce__(self) -> tuple[object, ...]:
        """Unpickling in a spawned process calls `end_with_it`: the imports that follow may take seconds."""
        return _arrived, (self.pid, self.lasting)

    def _watch(self) -> None:
        while os.getppid() == self.pid:
            time.sleep(CHECK_INTERVAL)
        os._exit(1)


def _arrived(pid: int, lasting: bool) -> Parent:
    parent = Parent(pid, lasting)
    if os.getpid() != pid:
        parent.end_with_it()
        load_extensions()  # before objects of their classes are unpickled
    return parent


def _ask_for_signal() -> bool:
    """Ask the system to kill this process when its parent ends; return whether it will."""
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):
        return int(ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)) == 0
    return False


@contextlib.contextmanager
def held_back(signals: Iterable[int]) -> Iterator[None]:
    """Delay the handlers of signals until the end of the block. They run in the main thread."""
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
    """Wait `grace` seconds for processes to end, then kill the rest.

    Returns those that even a kill does not end, because the system waits for a disk on their behalf. Nothing waits for
    them any more, not even the interpreter at its exit.
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
