"""Find duplicate rows and images with 64-bit digests, compared by sorting.

A million digests with their rows take 16 MB; as Python objects they would take hundreds. Two different pictures among a
million have the same digest once in forty million such sets.
"""

from __future__ import annotations

import json
from array import array

import numpy as np

from minimind_v.core.rows.members import hash_bytes
from minimind_v.core.rows.row import Row


class Digests:
    """Digests, each with the index of its row."""

    def __init__(self) -> None:
        self._digests, self._owners = array("Q"), array("Q")

    def add(self, owner: int, digest: int) -> None:
        """Add a digest of row `owner`; rows come in order."""
        self._digests.append(digest)
        self._owners.append(owner)

    @property
    def digests(self) -> np.ndarray:
        """All digests in order, uint64 [digests]."""
        return np.array(self._digests, np.uint64)

    @property
    def owners(self) -> np.ndarray:
        """The row of each, int64 [digests]."""
        return np.array(self._owners, np.int64)

    def firsts(self) -> np.ndarray:
        """The first row with each digest, int64 [digests]."""
        _, first, which = np.unique(self.digests, return_index=True, return_inverse=True)
        return self.owners[first[which]]

    def earlier_copies(self, rows: int) -> np.ndarray:
        """For each of `rows` rows an earlier row with one of its digests, or -1: int64 [rows]."""
        owners, firsts = self.owners, self.firsts()
        return _of_each_row(owners, firsts, firsts < owners, rows)

    def copies_in(self, other: Digests, rows: int) -> np.ndarray:
        """For each of `rows` rows the first row of another set with one of its digests, or -1: int64 [rows]."""
        if not len(other._digests):
            return np.full(rows, -1, np.int64)
        digests_there, first = np.unique(other.digests, return_index=True)
        digests = self.digests
        positions = np.minimum(np.searchsorted(digests_there, digests), len(digests_there) - 1)
        return _of_each_row(self.owners, other.owners[first[positions]], digests_there[positions] == digests, rows)


def _of_each_row(owners: np.ndarray, values: np.ndarray, mask: np.ndarray, rows: int) -> np.ndarray:
    """Of each row its first value in the mask, or -1."""
    row_values = np.full(rows, -1, np.int64)
    row_values[owners[mask][::-1]] = values[mask][::-1]  # reversed, as the last value written stays
    return row_values


def text_digest(row: Row) -> int:
    """A digest of a conversation."""
    return hash_bytes(json.dumps(row.conversations, sort_keys=True).encode())


def picture_digest(data: bytes) -> int:
    """A digest of a picture's bytes."""
    return hash_bytes(data, b"picture")


def whole_digest(text: int, pictures: list[int]) -> int:
    """A digest of a conversation and its pictures, by the digests of each."""
    return hash_bytes(b"".join(digest.to_bytes(8, "little") for digest in (text, *pictures)), b"row")
