"""A row store that contains some rows of another store."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minimind_v.core.rows.row import Row, RowStore


class SampledRows:
    """Rows of a store by their indices [rows]; `shuffled` keeps their order, which is already random."""

    def __init__(self, rows: RowStore, indices: np.ndarray) -> None:
        self.path = rows.path
        self._rows = rows
        self._indices = indices

    @property
    def file_kind(self) -> str:
        return self._rows.file_kind

    @property
    def split(self) -> str:
        return self._rows.split

    @property
    def pictures(self) -> Path | None:
        return self._rows.pictures

    def __len__(self) -> int:
        return len(self._indices)

    def number(self, index: int) -> int:
        return self._rows.number(int(self._indices[index]))

    def location(self, index: int) -> str:
        return self._rows.location(int(self._indices[index]))

    def row(self, index: int) -> Row:
        return self._rows.row(int(self._indices[index]))

    def picture(self, index: int, position: int, name: str) -> bytes:
        return self._rows.picture(int(self._indices[index]), position, name)

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        return np.arange(len(self))
