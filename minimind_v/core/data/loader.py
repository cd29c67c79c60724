"""The order of the rows, and the data workers that prepare batches.

Each epoch is a new permutation, drawn from the seed, and consists of windows of several steps. In a window rows are
sorted by length and cut into steps, so that a step has rows of similar length and hardly any padding; then the steps
are shuffled. A step's rows are divided, in order, into micro-batches, which the processes take in turn. So the rows of
step k depend on the seed and the rows per step only, not on the number of processes and micro-batches.

The windows lie in a few lanes, each a stretch of the permutation, and the steps come from the lanes in turn. As workers
take steps in turn too, 2 or 4 of them have lanes of their own and read different parts of a parquet file. All workers
share a file of tokens (`token_store.py`): those that wait for a window tokenise it together, and plan it from the
lengths alone.
"""

from __future__ import annotations

import atexit
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from minimind_v.core.data.batch import Batch, collate
from minimind_v.core.data.dataset import BrokenRow, Example, RowDataset
from minimind_v.core.data.token_store import Text, TokenStore, not_kept
from minimind_v.core.data.workers import CurrentRows, Packed, affordable, begin, end, unpacked
from minimind_v.core.processes import Parent, held_back
from minimind_v.core.signals import SIGNALS

LANES = 4  # each has parts of a parquet file in memory; 1, 2 and 4 workers share them evenly
WINDOW = 32  # steps per window: enough for rows of similar length, few enough for a random order


@dataclass(frozen=True)
class Window:
    """The steps of a window: of each, the rows of the micro-batches of all processes."""

    steps: list[list[np.ndarray]]
    texts: dict[int, Text]  # of rows that are in no file


class BatchPlan(Dataset[list[Batch]]):
    """All steps of a run by number: step k of epoch e is number e · steps_per_epoch + k.

    A step has `rows_per_step` rows (default: one batch per process). An item is the list of its micro-batches, each of
    up to `batch_size` rows, for process `rank` of `processes`. The last step of an epoch may have fewer rows, and none
    for some processes.
    """

    def __init__(
        self,
        dataset: RowDataset,
        batch_size: int,
        pad_id: int,
        seed: int | None = None,
        epochs: int = 1,
        limit: int | None = None,
        rows_per_step: int | None = None,
        processes: int = 1,
        rank: int = 0,
        keep: np.ndarray | None = None,
        tokens: TokenStore | None = None,
    ) -> None:
        """Without a seed the rows keep the order of their file; `limit` takes the first so many only.

        `keep`, bool [rows of the file], selects rows. `tokens` caches their token ids.
        """
        self.dataset, self.tokens = dataset, tokens
        self.kept = np.ones(len(dataset), bool) if keep is None else keep
        if limit is not None:
            self.kept = self.kept & (np.cumsum(self.kept) <= limit)
        self.rows = int(self.kept.sum())
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.epochs = epochs
        self.processes, self.rank = processes, rank
        self.rows_per_step = rows_per_step or batch_size * processes
        self.steps_per_epoch = -(-self.rows // self.rows_per_step)
        self.wide = 1 if seed is None else WINDOW  # without a seed nothing is sorted
        self.windows = -(-self.steps_per_epoch // self.wide)
        self._sequence = _lanes(self.steps_per_epoch, 1 if seed is None else LANES)
        self._planned: dict[tuple[int, int], Window] = {}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._reading = CurrentRows()  # to name the row that killed a worker
        self._warned = False  # that this process caches no more tokens

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __getitem__(self, number: int) -> list[Batch]:
        epoch, step = divmod(number, self.steps_per_epoch)
        number, position = divmod(int(self._sequence[step]), self.wide)
        if (epoch, number) not in self._planned:
            self._planned[epoch, number] = self.window(epoch, number)
            if len(self._planned) > LANES:
                del self._planned[next(iter(self._planned))]
        window = self._planned[epoch, number]
        batches = [self._read(rows, window.texts) for rows in window.steps[position][self.rank :: self.processes]]
        if batches and self.tokens and self.tokens.trouble and not self._warned:
            batches[0] = replace(batches[0], trouble=not_kept(f"{self.tokens.path}: {self.tokens.trouble}"))
            self._warned = True
        return batches

    def _read(self, rows: np.ndarray, texts: dict[int, Text]) -> Batch:
        """A micro-batch with its images."""
        read = [self.dataset.load(row) if isinstance(row, Example) else row for row in self._texts(rows, texts)]
        examples = [row for row in read if isinstance(row, Example)]
        broken = [row for row in read if isinstance(row, BrokenRow)]
        batch = collate(examples, broken, self.pad_id)
        for example in examples:
            example.images = []  # the window stays in memory, its images need not
        return batch

    def _texts(self, rows: np.ndarray, texts: dict[int, Text]) -> Iterator[Text]:
        """Rows with their places, without images; `texts` has those that are in no file."""
        kept = self.tokens.read(rows) if self.tokens else {}
        for index in rows.tolist():
            self._note(index)
            row = texts.get(index) or kept.get(index) or self.dataset.text(index)  # a damaged disk may lose some
            yield row if row.location else replace(row, location=self.dataset.rows.location(index))

    def check(self, rows: np.ndarray) -> list[BrokenRow]:
        """Those of the rows that training will skip, as far as that is known without decoding an image."""
        _, texts = self._lengths(rows)
        read = (self.dataset.check(row) if isinstance(row, Example) else row for row in self._texts(rows, texts))
        return [row for row in read if row is not None]

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch, [rows]."""
        if self._order[0] != epoch:
            order = np.arange(len(self.kept))
            if self.seed is not None:
                order = self.dataset.rows.shuffled(np.random.default_rng([self.seed, epoch]))
            self._order = epoch, order[self.kept[order]]
        return self._order[1]

    def window(self, epoch: int, window: int) -> Window:
        """One window; picture files are not read."""
        wide = self.wide * self.rows_per_step
        rows = self.order(epoch)[window * wide : (window + 1) * wide]
        lengths, texts = self._lengths(rows)
        if self.seed is not None:
            rows = rows[lengths.argsort(kind="stable")]
        steps = [
            self._share_out(rows[begin : begin + self.rows_per_step])
            for begin in range(0, len(rows), self.rows_per_step)
        ]
        if self.seed is not None:
            np.random.default_rng([self.seed, epoch, window]).shuffle(steps)
        return Window(steps, texts)

    def _lengths(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, Text]]:
        """The number of tokens of each row, 0 for a broken one, int64 [rows]; and the rows that are in no file."""
        if self.tokens is None:
            texts = {index: self._tokenise(index) for index in rows.tolist()}
            lengths = [len(text.tokens) if isinstance(text, Example) else 0 for text in texts.values()]
            return np.array(lengths, np.int64), texts
        return self.tokens.lengths(rows, self._tokenise)

    def _tokenise(self, index: int) -> Text:
        self._note(index)
        return self.dataset.text(index)

    def _share_out(self, rows: np.ndarray) -> list[np.ndarray]:
        """Micro-batches of nearly equal size, the same number for each process."""
        micro_batches = self.processes * self._rounds(len(rows))
        edges = [len(rows) * number // micro_batches for number in range(micro_batches + 1)]
        return [rows[begin:end] for begin, end in pairwise(edges)]

    def _rounds(self, rows: int) -> int:
        """Micro-batches per process of a step of `rows` rows."""
        return -(-rows // (self.batch_size * self.processes))

    @property
    def prefetch(self) -> int:
        """Steps that a worker prepares ahead: about four micro-batches."""
        return max(2, 4 // self._rounds(self.rows_per_step))

    def _note(self, index: int) -> None:
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            self._reading.note(worker.id, index)

    def read_by(self, process: int) -> str | None:
        """The file:row that a worker process was reading."""
        row = self._reading.row_of(process)
        return None if row is None else self.dataset.rows.location(row)


def _lanes(steps: int, lanes: int) -> np.ndarray:
    """The steps of the permutation in the order of reading, the lanes in turn: int64 [steps]."""
    numbers = np.arange(steps)
    windows = np.array_split(np.arange(-(-steps // WINDOW)), lanes)
    firsts = np.array([WINDOW * lane[0] for lane in windows if len(lane)], np.int64)
    lane = np.searchsorted(firsts, numbers, "right") - 1
    return np.lexsort((lane, numbers - firsts[lane])) if steps else numbers


def load_steps(
    plan: BatchPlan, workers: int, pin: bool = False, start: int = 0, warn: Callable[[str], None] = lambda _: None
) -> Generator[list[Batch], None, None]:
    """The steps of a plan from number `start` on; worker processes prepare them ahead and end with the generator.

    Warns if there is no room for so many workers. Raises RunError if a worker dies.
    """
    workers = affordable(workers, warn)
    if workers:
        _allow_files()
    loader: DataLoader[Any] = DataLoader(
        Packed(plan) if workers else plan,
        batch_size=None,
        sampler=range(start, len(plan)),
        num_workers=workers,
        prefetch_factor=plan.prefetch if workers else None,
        pin_memory=pin,
        worker_init_fn=partial(_prepare, Parent.current()),
        generator=torch.Generator(),  # else it would draw from the program's own random numbers
    )
    stop: Callable[[], None] = lambda: None  # noqa: E731
    try:
        with held_back(SIGNALS):  # a signal here would leave workers behind
            steps: Any = begin(loader) if workers else iter(loader)
            processes = list(getattr(steps, "_workers", ()))
            # Not left to the garbage collector: a traceback may hold `steps`, or the program's end this generator,
            # and the process would wait for its workers for ever.
            stop = partial(end, steps, processes)
            atexit.register(stop)
        yield from unpacked(steps, plan, processes) if workers else steps
    finally:
        stop()
        atexit.unregister(stop)  # last: if a signal interrupts `stop`, the program's end calls it


def _allow_files() -> None:
    """Raise the limit of open files: each tensor from a worker is one, and many micro-batches exceed the default."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def load_batches(plan: BatchPlan, workers: int) -> Generator[Batch, None, None]:
    """The batches of a plan one by one."""
    with closing(load_steps(plan, workers)) as steps:
        for step in steps:
            yield from step


def _prepare(parent: Parent, _: int) -> None:
    """Prepare a worker: it ends with its parent, and the parent handles signals to the group."""
    parent.end_with_it()
    shown = sys.excepthook
    # A thread of this process may still send results that the interrupted parent does not receive.
    sys.excepthook = lambda kind, *error: None if issubclass(kind, ConnectionError) else shown(kind, *error)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
