"""Bases of row stores: the rows of one file, and the rows of several files (shards), read one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minimind_v.core.rows.cells import decode_inline
from minimind_v.core.rows.forms import read_row
from minimind_v.core.rows.pictures import Pictures, open_pictures
from minimind_v.core.rows.row import NUMBERED, Reopened, Row
from minimind_v.core.rows.splits import Choice

Read = Callable[[Mapping[str, Any]], Row]  # from the fields of a row


class SplitRows:
    """Rows of one split, with pictures in the rows or in a folder, zip or tar. A subclass reads the rows."""

    choice = Choice("")
    left_out = ""
    read: Read = staticmethod(read_row)  # an evaluation reads the fields of a row in another way
    _images: Pictures

    @property
    def split(self) -> str:
        return self.choice.name

    @property
    def pictures(self) -> Path | None:
        return self._images.path

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, index: int) -> Row:
        raise NotImplementedError

    def picture(self, index: int, position: int, name: str) -> bytes:
        """Read a picture from its row if the row holds it (such a picture is numbered), else by its name."""
        inline = self.row(index).inline if NUMBERED.fullmatch(name) else {}
        return decode_inline(inline[position], name) if position in inline else self._images.read(name)

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self))


class FileRows(SplitRows, Reopened):
    """A store of the rows of one file. A subclass defines `__len__`, `row` and `file_kind`; `handle` is the open file.

    `images` is a folder, zip or tar of the pictures that are not in the rows.
    """

    file_kind: str

    def __init__(self, path: Path, images: Path | None = None) -> None:
        super().__init__(path)
        self._images = open_pictures(images)

    def number(self, index: int) -> int:
        return index + 1

    def location(self, index: int) -> str:
        """`file:row`, counted as an editor does."""
        return f"{self.path}:{self.number(index)}"


class ShardedRows(SplitRows):
    """Rows of a set of files of one split."""

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
