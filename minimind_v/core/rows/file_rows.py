"""Rows of a single file or folder: the base of their stores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minimind_v.core.rows.cells import decode_inline
from minimind_v.core.rows.forms import read_row
from minimind_v.core.rows.picture_sources import open_pictures
from minimind_v.core.rows.pictures import Pictures
from minimind_v.core.rows.row import NUMBERED, Reopened, Row
from minimind_v.core.rows.splits import Choice


class SplitRows:
    """Rows of one split, with pictures in the rows or in a folder, zip or tar. A subclass reads the rows."""

    choice = Choice("")
    left_out = ""
    _images: Pictures

    @property
    def split(self) -> str:
        return self.choice.name

    @property
    def pictures(self) -> Path | None:
        return self._images.path

    def __len__(self) -> int:
        raise NotImplementedError

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

    def row(self, index: int) -> Row:
        raise NotImplementedError

    def picture(self, index: int, position: int, name: str) -> bytes:
        """Read a picture from its row if the row holds it (such a picture is numbered), else by its name."""
        if NUMBERED.fullmatch(name):
            inline = self.row(index).inline
            if position in inline:
                return decode_inline(inline[position], name)
        return self._images.read(name)

    def read_fields(self, fields: Mapping[str, Any]) -> Row:
        """The row of these fields, in any supported form. Raises RowError."""
        row = read_row(fields)
        for position in row.inline:  # `picture` recognises these names
            row.images[position] = f"picture {position + 1}"
        return row
