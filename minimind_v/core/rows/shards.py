"""Rows in several files (shards), read one after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minimind_v.core.rows.file_rows import SplitRows


class ShardedRows(SplitRows):
    """Rows of a set of files of one split; a subclass reads the rows."""

    files: list[Path]
    _ends: np.ndarray  # of each file, in rows

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _at(self, index: int) -> tuple[int, int]:
        """The number of a row's file, and the row's index in the file."""
        file = int(np.searchsorted(self._ends, index, "right"))
        return file, index - (int(self._ends[file - 1]) if file else 0)

    def number(self, index: int) -> int:
        return self._at(index)[1] + 1

    def location(self, index: int) -> str:
        file, row = self._at(index)
        return f"{self.files[file]}:{row + 1}"
