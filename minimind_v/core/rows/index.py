"""An index of a large file: the start of each entry, computed once and stored beside the file."""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from minimind_v.core.errors import DataError, RunError
from minimind_v.core.files import write_atomically

WORTH_KEEPING = 10_000  # entries; finding fewer again takes no noticeable time
STAMP = 3  # columns in front


class Index:
    """Two whole numbers for each of N entries, uint64 [2, N], in memory or mapped from the file that keeps them.

    The kept file is `.NAME.index.npy`, or `.NAME.SUBJECT.index.npy` where a file or folder has several: a split of a
    folder, the pictures in a tar of rows. Three columns in front hold the size and time of the indexed file, a digest
    of `kind`, which describes the numbers, and checksums of the numbers. Where one of these differs, or the kept file
    is damaged, the index is built again: the same file may have been read as another kind before.
    """

    def __init__(self, path: Path, kind: str, build: Callable[[], np.ndarray], subject: str = "") -> None:
        self.kept = path.with_name(f".{path.name}{subject and '.'}{subject}.index.npy")
        stat = path.stat()
        layout = f"{kind}, behind {STAMP} columns"  # another layout gives another digest
        digest = hashlib.blake2b(layout.encode(), digest_size=16).digest()
        file = np.array([stat.st_size, stat.st_mtime_ns % 2**64], np.uint64)
        self._stamp = np.column_stack([file, np.frombuffer(digest, np.uint64)])
        self.array = self._read()
        if self.array is None:
            self.array = np.ascontiguousarray(build(), np.uint64)
            if self.array.shape[1] >= WORTH_KEEPING:
                self._keep()

    def __len__(self) -> int:
        return int(self.array.shape[1])

    def _read(self) -> Any:
        """The numbers in the kept file; None where it is absent, damaged or about something else."""
        with contextlib.suppress(Exception):  # numpy raises many kinds on damaged files
            kept = np.load(self.kept, mmap_mode="r", allow_pickle=False)
            if kept.dtype == np.uint64 and kept.ndim == 2:
                numbers = kept[:, STAMP:]
                if np.array_equal(kept[:, :STAMP], np.hstack([self._stamp, _checksums(numbers)])):
                    return numbers
        return None

    def _keep(self) -> None:
        whole = np.hstack([self._stamp, _checksums(self.array), self.array])
        with contextlib.suppress(RunError):  # a read-only folder: built again each time
            write_atomically(self.kept, lambda file: np.save(file, whole, allow_pickle=False))
            self.array = np.load(self.kept, mmap_mode="r", allow_pickle=False)[:, STAMP:]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle a mapped array by its file name, which costs nothing."""
        return self.__dict__ | ({"array": None} if isinstance(self.array, np.memmap) else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.array is None:
            self.array = self._read()
        if self.array is None:
            raise DataError(f"{self.kept}: changed while it was in use — run the command again")


def columns(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """Pairs of whole numbers as the two rows of an index, uint64 [2, pairs]."""
    return np.fromiter(chain.from_iterable(pairs), np.uint64).reshape(-1, 2).T


def _checksums(numbers: np.ndarray) -> np.ndarray:
    """The checksums of the two rows, as a column; 46 MB, the index of 2.9 million rows, take 20 ms."""
    return np.array([[zlib.crc32(row)] for row in numbers], np.uint64)
