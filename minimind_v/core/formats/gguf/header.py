"""Read the keys and tensor positions of a GGUF file, and check every count and length against the file size.

The reader of the `gguf` package does not check (it reads an array of 2⁴⁰ numbers in 94 bytes for ever), and makes an
object for each token.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
MOST_KEYS, MOST_TENSORS, MOST_ENTRIES = 10_000, 20_000, 1 << 21  # 2 million: several of the largest vocabularies
MOST_NAME = 1 << 16  # bytes of the name of a key or a tensor; llama.cpp allows 64 of a tensor
MOST_DIMENSIONS, MOST_ALIGNMENT = 4, 1 << 16
_BOOL, _STRING, _ARRAY = 7, 8, 9
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class TensorEntry:
    """The position, shape and ggml type of a tensor."""

    name: str
    shape: tuple[int, ...]  # as in torch: the outermost dimension first
    type: int
    begin: int  # byte of the file
    bytes: int

    @property
    def count(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The part of a file before the numbers."""

    keys: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_header(path: Path, type_sizes: dict[int, tuple[int, int]]) -> Header:
    """Read the keys and the tensors' positions; `type_sizes` has numbers and bytes of a block of each ggml type.

    Raises ValueError for another kind of file, and for a file that is too short.
    """
    size = path.stat().st_size
    if size < 24:
        raise ValueError("the file is shorter than its header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, size)
        if cursor.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := cursor.number("I")) not in (2, 3):
            raise ValueError(f"its format version is {version}; versions 2 and 3 are supported")
        tensors, keys = cursor.number("Q"), cursor.number("Q")
        for count, most, what in ((tensors, MOST_TENSORS, "tensors"), (keys, MOST_KEYS, "keys")):
            if count > most:
                raise ValueError(f"it has {count:,} {what}; the maximum is {most:,}")
        values = _read_keys(cursor, keys)
        return Header(values, _read_entries(cursor, tensors, _alignment(values), type_sizes))


def _read_keys(cursor: _Cursor, count: int) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.text(MOST_NAME)
        if name in keys:
            raise ValueError(f"the key {name} occurs twice")
        keys[name] = cursor.value(cursor.number("I"))
    return keys


def _alignment(keys: dict[str, Any]) -> int:
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two up to {MOST_ALIGNMENT:,}")
    return alignment


def _read_entries(
    cursor: _Cursor, count: int, alignment: int, type_sizes: dict[int, tuple[int, int]]
) -> dict[str, TensorEntry]:
    described = []
    for _ in range(count):
        name, dimensions = cursor.text(MOST_NAME), cursor.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions:,} dimensions; the maximum is {MOST_DIMENSIONS}")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        described.append((name, shape, cursor.number("I"), cursor.number("Q")))
    begin = -(-cursor.at // alignment) * alignment
    entries: dict[str, TensorEntry] = {}
    for name, shape, type, offset in described:
        if name in entries:
            raise ValueError(f"the tensor {name} occurs twice")
        if type not in type_sizes:
            raise ValueError(f"{name} has the unknown type {type}")
        block, bytes = type_sizes[type]
        if not prod(shape) or (shape[-1:] != () and shape[-1] % block):
            raise ValueError(f"{name} has the shape {list(shape)}, not a whole number of blocks of {block}")
        entry = TensorEntry(name, shape, type, begin + offset, prod(shape) // block * bytes)
        if entry.begin + entry.bytes > cursor.size:
            raise ValueError(f"{name} ends after the end of the file")
        entries[name] = entry
    in_order = sorted(entries.values(), key=lambda entry: entry.begin)
    if overlap := next(
        (after for before, after in pairwise(in_order) if before.begin + before.bytes > after.begin), None
    ):
        raise ValueError(f"{overlap.name} overlaps another tensor")
    return entries


class _Cursor:
    """A position in a file that advances, never beyond the file's end."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at = data, size, 0
        self.entries_left = MOST_ENTRIES

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise ValueError(f"it announces {count:,} bytes at byte {self.at:,}, but has only {self.size - self.at:,}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self, most: int) -> str:
        length = self.number("Q")
        if length > most:
            raise ValueError(f"a text of {length:,} bytes at byte {self.at:,}; the maximum is {most:,}")
        return self.take(length).decode()

    def value(self, type: int) -> Any:
        if type == _STRING:
            return self.text(self.size)
        if type == _ARRAY:
            return self.array()
        if type not in _FORMS:
            raise ValueError(f"a value of type {type} at byte {self.at:,}, which is unknown")
        return self.number(_FORMS[type])

    def array(self) -> list[Any]:
        """Numbers or texts; no program writes arrays of arrays."""
        type, count = self.number("I"), self.number("Q")
        self.entries_left -= count
        if self.entries_left < 0:
            raise ValueError(
                f"an array of {count:,} entries at byte {self.at:,}; the maximum is {MOST_ENTRIES:,} in all"
            )
        if type == _STRING:
            return [self.text(self.size) for _ in range(count)]
        if type not in _FORMS:
            raise ValueError(f"an array of type {type} at byte {self.at:,}, which is unknown")
        form = f"<{count}{_FORMS[type]}"
        return list(struct.unpack(form, self.take(struct.calcsize(form))))
