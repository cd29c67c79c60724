"""Apply a function to every row in several processes, in row order, and report rows that crash a process.

Not a `ProcessPoolExecutor`: its thread outlives `shutdown(wait=False)` and closes its pipe while the ending interpreter
still writes into it: a traceback in one of eight runs on a busy machine. Here no thread runs beside the caller, and no
process is left when `each_row` has ended.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Literal, TypeVar

from minimind_v.core.errors import RunError
from minimind_v.core.extensions import error_of_extension
from minimind_v.core.processes import Parent, end_processes

T = TypeVar("T")
RowFunction = Callable[[Any, int], T]
Span = tuple[int, int]  # rows from the first number on, up to the second
START: Literal["spawn"] = "spawn"  # a fork would inherit the libraries' threads
TOGETHER = 32  # rows that a process gets at a time
QUEUED = 2  # spans that a process has: one to work on, and the next
AHEAD = 4  # spans per process that may be done ahead of the next row in order


def each_row(
    functions: Sequence[RowFunction[T]], rows: Sized, crashed: Callable[[int], T], together: int = TOGETHER
) -> Iterator[T]:
    """`function(rows, index)` for every row, in order, in a process for each of `functions`.

    `crashed(index)` stands for a row that crashes its process; a process gets `together` rows at a time. Functions and
    rows are pickled. Raises the errors of functions, and RunError if a process ends before it has started.
    """
    pool: list[_Worker[T]] = []
    todo = deque((begin, min(begin + together, len(rows))) for begin in range(0, len(rows), together))
    done: dict[int, list[T]] = {}  # results by their first row
    at = 0  # the next row in order
    try:
        for function in functions[: len(todo)]:
            pool.append(_Worker(function, rows))
        while at < len(rows):
            if at in done:
                results = done.pop(at)
                yield from results
                at += len(results)
                continue
            for worker in pool:
                while todo and todo[0][0] < at + AHEAD * together * len(pool) and len(worker.spans) < QUEUED:
                    worker.give(todo.popleft())
            by_pipe: dict[Any, _Worker[T]] = {worker.pipe: worker for worker in pool if worker.spans}
            for pipe in wait(list(by_pipe)):
                worker = by_pipe[pipe]
                result = worker.take()
                if result is True:
                    worker.begun = True
                    continue
                if result is None and not worker.begun:
                    raise _too_early()
                (begin, end), *others = worker.spans
                if isinstance(result, Exception):
                    raise result
                if result is not None:
                    done[begin] = result
                    worker.spans.popleft()
                    continue
                # One of the rows of the first span crashed the process: try each alone.
                todo.extendleft(reversed(others))
                if begin + 1 == end:
                    done[begin] = [crashed(begin)]
                else:
                    todo.extendleft((index, index + 1) for index in reversed(range(begin, end)))
                worker.end()
                pool[pool.index(worker)] = _Worker(worker.function, rows)
    finally:
        with _no_ctrl_c():
            for worker in pool:
                worker.end()


class _Worker(Generic[T]):
    """A process that reads rows, the pipe to it, and its spans."""

    def __init__(self, function: RowFunction[T], rows: Sized) -> None:
        self.function = function
        context = multiprocessing.get_context(START)
        self.spans: deque[Span] = deque()
        self.begun = False
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(Parent.current(), theirs, function, rows), daemon=True)
        resource_tracker.ensure_running()  # its first call would let Ctrl-C through
        try:
            with _no_ctrl_c():  # inherited: only the parent handles Ctrl-C
                self._process.start()
        except BrokenPipeError:
            raise _too_early() from None
        theirs.close()  # only the process holds this end open

    def give(self, span: Span) -> None:
        self.spans.append(span)
        with suppress(ConnectionError):  # it has ended: `take` returns None
            self.pipe.send(span)

    def take(self) -> list[T] | Exception | Literal[True] | None:
        """The results of the first span, or its error; True if the process can read rows; None if it has ended."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        """End the process at once."""
        self.pipe.close()
        end_processes([self._process])


def _too_early() -> RunError:
    return RunError("a worker process ended before it started, perhaps for lack of memory — try fewer of them")


def _work(parent: Parent, pipe: Connection, function: RowFunction[T], rows: Any) -> None:
    """Read spans until the pipe closes. Unpickling `parent` before `rows` ties the process to its parent first."""
    with suppress(EOFError, ConnectionError):  # the parent has ended
        pipe.send(True)
        while True:
            begin, end = pipe.recv()
            try:
                results: Any = [function(rows, index) for index in range(begin, end)]
            except Exception as error:
                results = error_of_extension(error) or error
            pipe.send(results)


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Block Ctrl-C, if the system can block signals."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
