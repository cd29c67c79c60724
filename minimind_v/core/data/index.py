"""Where each entry of a large file begins: found once, then kept beside the file."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minimind_v.core.errors import RunError
from minimind_v.core.files import write_atomically

WORTH_KEEPING = 10_000  # entries; fewer are found again in less time than anybody notices
STAMP = 2  # columns in front


class Index:
    """Two whole numbers about each of N entries, uint64 [2, N], in memory or mapped from the file that keeps them.

    The kept file, `.NAME.index.npy`, has two columns more in front: the size and the time of the file that it is about,
    and a digest of `kind`, which says what the numbers are and who reads them so. Where one of these differs, or the
    kept file is damaged, it is made again: the same file may have been read as something else before.
    """

    def __init__(self, path: Path, kind: str, build: Callable[[], np.ndarray]) -> None:
        self.kept = path.with_name(f".{path.name}.index.npy")
        stat = path.stat()
        digest = hashlib.blake2b(kind.encode(), digest_size=16).digest()
        stamp = np.array([[stat.st_size, 0], [stat.st_mtime_ns, 0]], np.uint64)
        stamp[:, 1] = np.frombuffer(digest, np.uint64)
        self.array = self._read(stamp)
        if self.array is None:
            self.array = build().astype(np.uint64)
            if self.array.shape[1] >= WORTH_KEEPING:
                self._keep(stamp)

    def __len__(self) -> int:
        return int(self.array.shape[1])

    def _read(self, stamp: np.ndarray) -> Any:
        with contextlib.suppress(OSError, ValueError, EOFError):  # absent, cut off, something else
            found = np.load(self.kept, mmap_mode="r", allow_pickle=False)
            if found.dtype == np.uint64 and found.ndim == 2 and np.array_equal(found[:, :STAMP], stamp):
                return found[:, STAMP:]
        return None

    def _keep(self, stamp: np.ndarray) -> None:
        both = np.hstack([stamp, self.array])
        with contextlib.suppress(RunError):  # a folder that nobody may write to: found anew each time
            write_atomically(self.kept, lambda file: np.save(file, both, allow_pickle=False))
            self.array = np.load(self.kept, mmap_mode="r", allow_pickle=False)[:, STAMP:]

    def __getstate__(self) -> dict[str, Any]:
        """What is mapped travels by its name, which costs nothing."""
        return self.__dict__ | ({"array": None} if isinstance(self.array, np.memmap) else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.array is None:
            self.array = np.load(self.kept, mmap_mode="r", allow_pickle=False)[:, STAMP:]
