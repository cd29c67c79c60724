"""Check the memory that a parquet file needs before pyarrow reads it.

A page header states the unpacked size of its page, and pyarrow allocates that size before it reads the page. A
dictionary holds a value once, and rows repeat it at no cost in the file. The page headers hold both sizes, in Thrift's
compact protocol (github.com/apache/parquet-format, `PageHeader`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq

PAGE_LIMIT = 2**29  # bytes that a page may unpack to: twice the largest picture
BATCH_LIMIT = 2**30  # bytes of the rows that are read together
MANY_ROWS, ROWS_PER_BYTE = 10**6, 64  # more rows than both limits are not data
HEADER = 2**10  # bytes of a page header that are read first; statistics can make it longer
LONGEST_HEADER = 2**24
DICTIONARY = 2  # the type of a dictionary page
_FIXED = {1: 0, 2: 0, 3: 1, 7: 8}  # Thrift's types and their bytes: true, false, byte, double
_BITS = {4: 16, 5: 32, 6: 64}  # of whole numbers: pyarrow truncates a longer number
_BINARY, _STRUCT = 8, 12
_DEEPEST = 8


@dataclass(frozen=True)
class Page:
    """A page of a column chunk: `begin` is its offset behind the header; sizes are in bytes."""

    kind: int
    unpacked: int
    packed: int
    begin: int


def check_footer(file: Path, footer: pq.FileMetaData) -> None:
    """Raises ValueError where a footer has more rows or larger columns than its file can hold."""
    size = file.stat().st_size
    rows = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != footer.num_rows:
        raise ValueError("its row groups do not add up to its rows")
    if footer.num_rows > max(MANY_ROWS, ROWS_PER_BYTE * size):
        raise ValueError(f"{footer.num_rows:,} rows in {size:,} bytes")


def dictionary_size(file: Path, group: pq.RowGroupMetaData, leaves: list[int]) -> int:
    """The bytes of the largest dictionary of some columns of a group. Raises ValueError for a too large page.

    Reads the headers of all pages. A damaged header ends the walk, since pyarrow does not read beyond it either.
    """
    largest = 0
    with file.open("rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        for leaf in leaves:
            chunk = group.column(leaf)
            first, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset
            begin = dictionary if dictionary and 0 < dictionary < first else first
            end = begin + chunk.total_compressed_size
            if not 0 <= begin <= end <= size:
                raise ValueError(f"column {chunk.path_in_schema} is outside the file")
            for page in _pages(opened, begin, end):
                if page.begin + page.packed > size:
                    raise ValueError(f"a page of {chunk.path_in_schema} continues after the end of the file")
                if page.unpacked > PAGE_LIMIT:
                    raise ValueError(
                        f"a page of {chunk.path_in_schema} unpacks to {page.unpacked:,} bytes; the maximum is "
                        f"{PAGE_LIMIT:,} — write the file with smaller pages"
                    )
                if page.kind == DICTIONARY:
                    largest = max(largest, page.unpacked)
    return largest


def _pages(file: BinaryIO, at: int, end: int) -> Iterator[Page]:
    while at < end:
        header = min(HEADER, end - at)
        while True:
            try:
                file.seek(at)
                page = _read_header(file.read(header), at)
                break
            except IndexError:  # the header is longer
                if header == end - at or header >= LONGEST_HEADER:
                    return
                header = min(4 * header, end - at)
            except ValueError:
                return
        yield page
        at = page.begin + page.packed


def _read_header(data: bytes, at: int) -> Page:
    """Raises IndexError where the data is too short, ValueError where it is not a page header."""
    numbers, end = _read_struct(data, 0, 0)
    kind, unpacked, packed = (numbers.get(field, -1) for field in (1, 2, 3))
    if min(kind, unpacked, packed) < 0:
        raise ValueError("not a page header")
    return Page(kind, unpacked, packed, at + end)


def _read_struct(data: bytes, at: int, depth: int) -> tuple[dict[int, int], int]:
    """The whole numbers of a struct by field, and the position of its end."""
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    numbers: dict[int, int] = {}
    field = 0
    while byte := data[at]:
        kind, at = byte & 15, at + 1
        if byte >> 4:
            field += byte >> 4
        else:
            field, at = _read_number(data, at, 16)
        if kind in _BITS:
            numbers[field], at = _read_number(data, at, _BITS[kind])
        else:
            at = _skip(data, at, kind, depth)
    return numbers, at + 1


def _skip(data: bytes, at: int, kind: int, depth: int) -> int:
    if kind in _FIXED:
        return at + _FIXED[kind]
    if kind == _BINARY:
        length, at = _read_varint(data, at)
        return at + length
    if kind == _STRUCT:
        return _read_struct(data, at, depth + 1)[1]
    raise ValueError(f"type {kind} is in no page header")  # lists and maps


def _read_number(data: bytes, at: int, bits: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    value %= 1 << bits
    return value >> 1 ^ -(value & 1), at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("not a number")
