"""Every row of a set through a function, in several processes, in the order of the rows; a row that kills is named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from minimind_v.core.data.workers import semaphores

T = TypeVar("T")
Look = Callable[[Any, int], T]
TOGETHER = 32  # rows that a process is given at a time
AHEAD = 4  # such spans per process that are under way
SEMAPHORES = 8  # that a pool's queues have, and a few more

_rows: Any  # of a worker process


def each_row(look: Look[T], rows: Sized, workers: int, crashed: Callable[[int], T]) -> Iterator[T]:
    """`look(rows, index)` for every row, in order; `crashed(index)` of one that ends its process. All are pickled."""
    at = 0  # the first row whose result is not out
    if semaphores(SEMAPHORES) < SEMAPHORES:  # a container without shared memory: in this process
        yield from (look(rows, index) for index in range(len(rows)))
        return
    while at < len(rows):
        pool, waiting, ahead = _pool(rows, workers), deque[Future[list[T]]](), at
        try:
            while at < len(rows):
                while ahead < len(rows) and len(waiting) < AHEAD * workers:
                    waiting.append(_submit(pool, look, ahead, min(ahead + TOGETHER, len(rows))))
                    ahead += TOGETHER
                found = waiting[0].result()
                waiting.popleft()
                at += len(found)
                yield from found
        except BrokenProcessPool:  # over one of the rows that were under way: go through the first of them one by one
            end = min(at + TOGETHER, len(rows))
            yield from _one_by_one(look, rows, at, end, crashed)
            at = end
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _one_by_one(look: Look[T], rows: Sized, begin: int, end: int, crashed: Callable[[int], T]) -> Iterator[T]:
    pool = _pool(rows, 1)
    try:
        for index in range(begin, end):
            try:
                found = _submit(pool, look, index, index + 1).result()[0]
            except BrokenProcessPool:
                found, pool = crashed(index), _pool(rows, 1)
            yield found
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(rows: Sized, workers: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit whatever threads the libraries have
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(rows,))


def _submit(pool: ProcessPoolExecutor, look: Look[T], begin: int, end: int) -> Future[list[T]]:
    """The first call starts the processes. They inherit that Ctrl-C is held back: it is the parent's business."""
    if not hasattr(signal, "pthread_sigmask"):
        return pool.submit(_look_at, look, begin, end)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(_look_at, look, begin, end)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(rows: Any) -> None:
    global _rows
    _rows = rows
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed tells nobody to stop, and a process would wait for rows for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _look_at(look: Look[T], begin: int, end: int) -> list[T]:
    return [look(_rows, index) for index in range(begin, end)]
