"""A store of selected rows of another store."""

from __future__ import annotations

import numpy as np

from minimind_v.core.rows.row import Row, RowStore


class RowsOfStores:
    """Rows of other stores; a subclass says which store has a row."""

    def _store(self, index: int) -> tuple[RowStore, int]:
        """The store of a row, and the row's index there."""
        raise NotImplementedError

    def number(self, index: int) -> int:
        store, row = self._store(index)
        return store.number(row)

    def location(self, index: int) -> str:
        store, row = self._store(index)
        return store.location(row)

    def row(self, index: int) -> Row:
        store, row = self._store(index)
        return store.row(row)

    def picture(self, index: int, position: int, name: str) -> bytes:
        store, row = self._store(index)
        return store.picture(row, position, name)


class SampledRows(RowsOfStores):
    """Rows of a store by their indices [rows]; `shuffled` keeps their order, which is already random."""

    def __init__(self, rows: RowStore, indices: np.ndarray) -> None:
        self.path, self.file_kind, self.split, self.pictures = rows.path, rows.file_kind, rows.split, rows.pictures
        self._rows, self._indices = rows, indices

    def __len__(self) -> int:
        return len(self._indices)

    def _store(self, index: int) -> tuple[RowStore, int]:
        return self._rows, int(self._indices[index])

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        return np.arange(len(self))
