"""A long list of similar texts, stored compressed."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
PACK = 4096  # items that are compressed together


class Packed(Generic[T]):
    """A list to append to and iterate over. A hundred thousand messages that differ in a number take 1 MB."""

    def __init__(self) -> None:
        self._packs: list[bytes] = []
        self._loose: list[T] = []

    def append(self, item: T) -> None:
        self._loose.append(item)
        if len(self._loose) == PACK:
            self._packs.append(zlib.compress(pickle.dumps(self._loose), 1))
            self._loose = []

    def __iter__(self) -> Iterator[T]:
        for pack in self._packs:
            yield from pickle.loads(zlib.decompress(pack))
        yield from self._loose
