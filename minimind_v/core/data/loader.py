"""The order of rows and the workers that prepare them.

Each epoch is a new permutation, drawn from the seed. It is walked in windows of several batches; in a window rows are
sorted by length and cut into batches, so that a batch holds rows of similar length and hardly any padding, and the
batches are shuffled again. What batch number k holds depends on the seed alone, not on how many workers there are.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Generator

import numpy as np
from torch.utils.data import DataLoader, Dataset

from minimind_v.core.data.batch import Batch, collate
from minimind_v.core.data.dataset import BrokenRow, Example, RowDataset

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
        self._window: tuple[int, list[list[Example | BrokenRow]]] = (-1, [])
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.batches_per_epoch * self.epochs

    def __getitem__(self, number: int) -> Batch:
        epoch, batch = divmod(number, self.batches_per_epoch)
        window, place = divmod(batch, WINDOW)
        key = epoch * self.batches_per_epoch + window
        if self._window[0] != key:
            self._window = (key, self._plan(epoch, window))
        read = [row if isinstance(row, BrokenRow) else self.dataset.load(row) for row in self._window[1][place]]
        examples = [row for row in read if isinstance(row, Example)]
        broken = [row for row in read if isinstance(row, BrokenRow)]
        batch_read = collate(examples, broken, self.pad_id)
        for example in examples:
            example.pixels = None  # the window stays, its pictures need not
        return batch_read

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch, [rows]."""
        if self._order[0] != epoch:
            rows = np.arange(self.rows)
            self._order = (
                epoch,
                rows if self.seed is None else np.random.default_rng([self.seed, epoch]).permutation(rows),
            )
        return self._order[1]

    def _plan(self, epoch: int, window: int) -> list[list[Example | BrokenRow]]:
        """Cut one window of rows into batches of similar length."""
        begin = window * WINDOW * self.batch_size
        rows = [self.dataset.text(int(index)) for index in self.order(epoch)[begin : begin + WINDOW * self.batch_size]]
        count = -(-len(rows) // self.batch_size)
        if self.seed is not None:
            rows.sort(key=lambda row: len(row.tokens) if isinstance(row, Example) else 0)
        batches = [rows[n * self.batch_size : (n + 1) * self.batch_size] for n in range(count)]
        if self.seed is not None:
            np.random.default_rng([self.seed, epoch, window]).shuffle(batches)
        return batches


def load_batches(plan: BatchPlan, workers: int, pin: bool = False) -> Generator[Batch, None, None]:
    """The batches of a plan in order, prepared ahead by worker processes, which end when this does."""
    loader: DataLoader[Batch] = DataLoader(
        plan,
        batch_size=None,
        sampler=range(len(plan)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin,
        worker_init_fn=_leave_signals,
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
