"""The order of rows and the workers that prepare them.

Each epoch is a new permutation, drawn from the seed. It is walked in windows of several batches; in a window rows are
sorted by length and cut into batches, so that a batch holds rows of similar length and hardly any padding, and the
batches are shuffled again. The windows are walked in a few lanes, batch by batch in turn, each lane a stretch of the
permutation: as the workers too take batches in turn, each has lanes of its own, tokenises no window that another does,
and reads parts of a parquet file that no other reads. What batch number k holds depends on the seed alone.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Generator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from minimind_v.core.data.batch import Batch, collate
from minimind_v.core.data.dataset import BrokenRow, Example, RowDataset

LANES = 4  # a number that 1, 2 and 4 workers share evenly
WINDOW = 32  # batches per window: enough to find rows of one length, and few enough to keep the order random


class BatchPlan(Dataset[Batch]):
    """All batches of a run by number: batch k of epoch e is number e · batches_per_epoch + k."""

    def __init__(
        self,
        dataset: RowDataset,
        batch_size: int,
        pad_id: int,
        seed: int | None = None,
        epochs: int = 1,
        limit: int | None = None,
    ) -> None:
        """Without a seed the rows keep the order of their file; `limit` leaves out all but the first so many."""
        self.dataset = dataset
        self.rows = len(dataset) if limit is None else min(limit, len(dataset))
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.epochs = epochs
        self.batches_per_epoch = -(-self.rows // batch_size)
        self._sequence = _lanes(self.batches_per_epoch, 1 if seed is None else LANES)
        self._windows: dict[tuple[int, int], list[list[Example | BrokenRow]]] = {}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.batches_per_epoch * self.epochs

    def __getitem__(self, number: int) -> Batch:
        epoch, batch = divmod(number, self.batches_per_epoch)
        window, place = divmod(int(self._sequence[batch]), WINDOW)
        if (epoch, window) not in self._windows:
            self._windows[epoch, window] = self.window(epoch, window)
            if len(self._windows) > LANES:
                del self._windows[next(iter(self._windows))]
        planned = self._windows[epoch, window][place]
        read = [row if isinstance(row, BrokenRow) else self.dataset.load(row) for row in planned]
        examples = [row for row in read if isinstance(row, Example)]
        broken = [row for row in read if isinstance(row, BrokenRow)]
        batch_read = collate(examples, broken, self.pad_id)
        for example in examples:
            example.pixels = None  # the window stays, its pictures need not
        return batch_read

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch, [rows]."""
        if self._order[0] != epoch:
            order = np.arange(self.rows)
            if self.seed is not None:
                order = self.dataset.rows.shuffled(np.random.default_rng([self.seed, epoch]))
            self._order = epoch, order if len(order) == self.rows else order[order < self.rows]
        return self._order[1]

    def window(self, epoch: int, window: int) -> list[list[Example | BrokenRow]]:
        """One window of rows, cut into batches of similar length; their pictures are not read."""
        begin = window * WINDOW * self.batch_size
        rows = [self.dataset.text(int(index)) for index in self.order(epoch)[begin : begin + WINDOW * self.batch_size]]
        count = -(-len(rows) // self.batch_size)
        if self.seed is not None:
            rows.sort(key=lambda row: len(row.tokens) if isinstance(row, Example) else 0)
        batches = [rows[n * self.batch_size : (n + 1) * self.batch_size] for n in range(count)]
        if self.seed is not None:
            np.random.default_rng([self.seed, epoch, window]).shuffle(batches)
        return batches


def _lanes(batches: int, lanes: int) -> np.ndarray:
    """Which batch of the permutation is the k-th to be read: the lanes' batches in turn, int64 [batches]."""
    numbers = np.arange(batches)
    windows = np.array_split(np.arange(-(-batches // WINDOW)), lanes)
    firsts = np.array([WINDOW * lane[0] for lane in windows if len(lane)], np.int64)
    lane = np.searchsorted(firsts, numbers, "right") - 1
    return np.lexsort((lane, numbers - firsts[lane])) if batches else numbers


def load_batches(plan: BatchPlan, workers: int, pin: bool = False, start: int = 0) -> Generator[Batch, None, None]:
    """The batches of a plan from number `start` on, prepared ahead by worker processes, which end when this does."""
    loader: DataLoader[Batch] = DataLoader(
        plan,
        batch_size=None,
        sampler=range(start, len(plan)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # its draw would otherwise be one from the program's own random numbers
    )
    batches = iter(loader)
    # Not left to the garbage collector: a traceback may hold `batches`, or the program's end this generator, and a
    # process waits for ever for workers that nobody has told to stop.
    stop = getattr(batches, "_shutdown_workers", lambda: None)
    atexit.register(stop)
    try:
        yield from batches
    finally:
        atexit.unregister(stop)
        stop()


def _leave_signals(_: int) -> None:
    """Signals to the whole group are the main process's business; it ends its workers itself."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
