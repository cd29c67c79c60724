"""Apply a function to every row in several processes, in row order; a row that crashes a process is named.

The processes are ours, each at one end of a pipe, and not a `ProcessPoolExecutor`: that one has a thread which outlives
`shutdown(wait=False)` and closes its pipe while the interpreter, at its end, still writes into it: a traceback in one
of eight runs on a busy machine. Here nothing runs beside the caller, and nothing is left when `each_row` has ended.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from minimind_v.core.errors import RunError
from minimind_v.core.processes import Parent, end_processes

T = TypeVar("T")
Look = Callable[[Any, int], T]
Span = tuple[int, int]  # rows from the first number on, up to the second
TOGETHER = 32  # rows that a process is given at a time
QUEUED = 2  # spans that a process has: one to work on, one so that it need not wait
AHEAD = 4 * TOGETHER  # rows per process that may be done before the row that is next in order


def each_row(look: Look[T], rows: Sized, workers: int, crashed: Callable[[int], T]) -> Iterator[T]:
    """`look(rows, index)` for every row, in order; `crashed(index)` of one that ends its process. All are pickled.

    Raises what `look` raises, and RunError where a process ends before it has begun.
    """
    pool: list[_Worker[T]] = []
    todo = deque((begin, min(begin + TOGETHER, len(rows))) for begin in range(0, len(rows), TOGETHER))
    done: dict[int, list[T]] = {}  # results by their first row
    at = 0  # the row that is next in order
    try:
        for _ in range(min(workers, len(todo))):
            pool.append(_Worker(look, rows))
        while at < len(rows):
            if at in done:
                results = done.pop(at)
                yield from results
                at += len(results)
                continue
            for worker in pool:
                while todo and todo[0][0] < at + AHEAD * workers and len(worker.spans) < QUEUED:
                    worker.give(todo.popleft())
            by_pipe: dict[Any, _Worker[T]] = {worker.pipe: worker for worker in pool if worker.spans}
            for pipe in wait(list(by_pipe)):
                worker = by_pipe[pipe]
                if not worker.begun:
                    worker.begin()
                    continue
                result = worker.take()
                (begin, end), *others = worker.spans
                if isinstance(result, Exception):
                    raise result
                if result is not None:
                    done[begin] = result
                    worker.spans.popleft()
                    continue
                # The process has ended over one of the rows of the first span: each of them gets a turn of its own.
                todo.extendleft(reversed(others))
                if begin + 1 == end:
                    done[begin] = [crashed(begin)]
                else:
                    todo.extendleft((index, index + 1) for index in reversed(range(begin, end)))
                worker.end()
                pool[pool.index(worker)] = _Worker(look, rows)
    finally:
        with _no_ctrl_c():
            for worker in pool:
                worker.end()


class _Worker(Generic[T]):
    """A process that looks at rows, the pipe to it, and the spans that it has been given."""

    def __init__(self, look: Look[T], rows: Sized) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit whatever threads the libraries have
        self.spans: deque[Span] = deque()
        self.begun = False
        self.pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(Parent.current(), theirs, look, rows), daemon=True)
        resource_tracker.ensure_running()  # the first time it lets Ctrl-C through again
        try:
            with _no_ctrl_c():  # inherited: Ctrl-C is the business of the process that waits for the results
                self._process.start()
        except BrokenPipeError:
            raise _too_early() from None
        theirs.close()  # so that the process is the only one that holds the pipe open

    def give(self, span: Span) -> None:
        self.spans.append(span)
        with suppress(ConnectionError):  # it has ended: `take` says so
            self.pipe.send(span)

    def begin(self) -> None:
        """Take note that the process can read rows. Raises RunError where it has ended before."""
        try:
            self.begun = self.pipe.recv()
        except (EOFError, OSError):
            raise _too_early() from None

    def take(self) -> list[T] | Exception | None:
        """The results of the first span, or what was raised over it; None where the process has ended."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        """At once: all that it could still say is of no use."""
        self.pipe.close()
        end_processes([self._process])


def _too_early() -> RunError:
    return RunError("a worker process ended before it started, perhaps for lack of memory — try fewer --workers")


def _work(parent: Parent, pipe: Connection, look: Look[T], rows: Any) -> None:
    """Answer spans to the end. `parent` has taken effect by its arrival, before what the rows need was imported."""
    with suppress(EOFError, ConnectionError):  # whoever asked has ended
        pipe.send(True)
        while True:
            begin, end = pipe.recv()
            try:
                results: Any = [look(rows, index) for index in range(begin, end)]
            except Exception as error:
                results = error
            pipe.send(results)


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Holds Ctrl-C back, where signals can be held back."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
