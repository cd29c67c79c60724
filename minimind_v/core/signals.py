"""Stop on a signal: after the first one a run ends cleanly, after the second one at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
T = TypeVar("T")


class _Stopped(BaseException):
    """A signal ended a wait. It is no Exception, since code that reads rows counts those as broken rows."""


class StopRequest:
    """While entered, SIGINT, SIGTERM, SIGHUP and SIGUSR1 (Slurm's warning) set `signal`; a second one stops at once.

    SIGHUP stays ignored if it was ignored, as under nohup.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._waiting = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in SIGNALS:
                if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._waiting:
            raise _Stopped

    def wait(self, get: Callable[[], T]) -> T | None:
        """Return what `get` returns; None where a signal asks to stop before that.

        The signal interrupts `get` at any point; `get` must not be called again afterwards.
        """
        try:
            self._waiting = self.signal is None
            value = get() if self._waiting else None
            self._waiting = False
            return value
        except _Stopped:
            return None
        finally:
            self._waiting = False


@contextmanager
def exits_on_sigterm() -> Iterator[None]:
    """While entered, SIGTERM ends the program as Ctrl-C does: what it began is put right first."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
