"""Columns of parquet files, read piece by piece within bounds of memory: a row group, or a fraction of a large one."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minimind_v.core.errors import RowError
from minimind_v.core.rows.parquet_bounds import BATCH_LIMIT, check_footer, dictionary_size

# Unpacked bytes of text and of pictures whose rows are mixed with each other, and that stay in memory: the loader reads
# four lanes at a time, each in a mixture of its own.
MIXED_TEXT, MIXED_PICTURES = 4 * 2**20, 64 * 2**20
KEPT_TEXT, KEPT_PICTURES = 5 * MIXED_TEXT, 5 * MIXED_PICTURES
READERS = 8  # open readers, each of one group


class Pieces:
    """Some columns of parquet files, read piece by piece; each process has its own files and pieces."""

    def __init__(self, files: list[Path], footers: list[pq.FileMetaData], columns: list[str], kept: int) -> None:
        self.files, self.columns, self.kept = files, columns, kept
        names = footers[0].schema.to_arrow_schema().names
        self.names = [column if column in names else column.partition(".")[0] for column in columns]
        pieces = []  # of each: file, group, number in the group, rows, first row, unpacked bytes
        row = 0
        for file, footer in enumerate(footers):
            numbers = leaves_below(footer, columns)
            for number in range(footer.num_row_groups):
                group = footer.row_group(number)
                size = sum(group.column(n).total_uncompressed_size for n in numbers)
                count = max(1, min(-(-size // (kept // 8)), group.num_rows))
                rows = -(-group.num_rows // count) or 1
                for number_in_group, first in enumerate(range(0, group.num_rows, rows)):
                    pieces.append((file, number, number_in_group, rows, row + first, size // count))
                row += group.num_rows
        self.rows = row
        table = np.array(pieces, np.int64).reshape(-1, 6)
        self.groups, self.starts, self.sizes = table[:, :4], table[:, 4].copy(), table[:, 5].copy()
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._kept: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._footers: dict[int, pq.FileMetaData] = {}
        self._going: dict[int, Iterator[pa.RecordBatch]] = {}  # open readers by their next piece

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict(), "_going": {}, "_footers": {}}

    def row(self, index: int) -> dict[str, Any]:
        piece, position = self._piece(index)
        row = {}
        for name in self.names:
            try:
                row[name] = piece.column(name)[position].as_py()
            except Exception as error:  # damage raises many kinds, a bad byte UnicodeDecodeError
                raise RowError(f"`{name}` cannot be read ({' '.join(str(error).split())})", "json") from None
        return row

    def _piece(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The piece of a row and the row's position in it. Raises RowError for a damaged piece."""
        if self._pid != os.getpid():
            self._forget()
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        if number not in self._kept:
            try:
                self._kept[number] = self._read(number)
            except Exception as error:  # the library raises many kinds on damaged files
                file = self.files[self.groups[number, 0]]
                text = " ".join(str(error).split())
                raise RowError(
                    f"damaged in {file.name}, row group {self.groups[number, 1]} ({text})", "parquet"
                ) from None
            self._drop()
        self._kept.move_to_end(number)
        return self._kept[number], index - int(self.starts[number])

    def _read(self, number: int) -> pa.RecordBatch:
        """Read a piece, from an open reader of its group or from the beginning of the group."""
        file, group, number_in_group, rows = (int(value) for value in self.groups[number])
        at = max((piece for piece in self._going if number - number_in_group <= piece <= number), default=None)
        if at is None:
            at, reader = number - number_in_group, self._batches(file, group, rows)
        else:
            reader = self._going.pop(at)
        for _ in range(at, number):
            next(reader, None)
        batch = next(reader, None)
        if batch is None:
            raise pa.ArrowInvalid("fewer rows than the file's metadata says")
        if number + 1 < len(self.groups) and self.groups[number + 1, 2]:  # a piece of the same group
            self._going[number + 1] = reader
            if len(self._going) > READERS:
                del self._going[next(iter(self._going))]
        return batch

    def _batches(self, file: int, group: int, rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a group, `rows` at a time: joined from smaller batches where a dictionary may make them huge."""
        path = self.files[file]
        footer = self._footers.get(file) or self._footers.setdefault(file, _footer(path))
        numbers = leaves_below(footer, self.columns)
        together = BATCH_LIMIT // max(1, dictionary_size(path, footer.row_group(group), numbers))
        # Without buffering ahead, and without threads, which a fork would not inherit.
        source = pq.ParquetFile(source_of(path), metadata=footer, buffer_size=2**20, pre_buffer=False)
        if together >= rows:
            return source.iter_batches(rows, [group], self.columns, use_threads=False)
        few = max(1, together // 4)
        return _joined(source.iter_batches(few, [group], self.columns, use_threads=False), rows)

    def _drop(self) -> None:
        """Drop the least recently used pieces beyond the limit."""
        held = sum(int(self.sizes[number]) for number in self._kept)
        while held > self.kept and len(self._kept) > 1:
            number, _ = self._kept.popitem(last=False)
            held -= int(self.sizes[number])

    def shuffled(self, rng: np.random.Generator, together: int) -> np.ndarray:
        """A permutation of all rows that mixes about `together` of them with each other."""
        firsts = np.flatnonzero(self.groups[:, 2] == 0)
        ends, bounds = np.append(firsts[1:], len(self.groups)), np.append(self.starts, self.rows)
        pieces = [piece for n in rng.permutation(len(firsts)) for piece in range(firsts[n], ends[n])]
        order = np.empty(self.rows, np.int64)
        begin = end = 0  # of the current mixture
        for piece in pieces:
            count = bounds[piece + 1] - bounds[piece]
            if end - begin + count > together:
                rng.shuffle(order[begin:end])
                begin = end
            order[end : end + count] = np.arange(bounds[piece], bounds[piece + 1])
            end += count
        rng.shuffle(order[begin:end])
        return order


def _joined(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows, `rows` at a time. Raises ArrowInvalid where these exceed BATCH_LIMIT."""
    pieces: list[pa.RecordBatch] = []
    count = size = 0
    for batch in batches:
        while len(batch):
            piece = batch.slice(0, rows - count)
            batch = batch.slice(len(piece))
            pieces.append(piece)
            count, size = count + len(piece), size + piece.nbytes
            if size > BATCH_LIMIT:
                raise pa.ArrowInvalid(f"more than {BATCH_LIMIT:,} bytes in {count:,} rows")
            if count == rows:
                yield pa.concat_batches(pieces)
                pieces, count, size = [], 0, 0
    if pieces:
        yield pa.concat_batches(pieces)


def source_of(file: Path) -> Path | BinaryIO:
    """The file in a form that pyarrow opens: it takes only file names in UTF-8."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return file.open("rb")
    return file


def _footer(file: Path) -> pq.FileMetaData:
    return pq.read_metadata(source_of(file))


def checked_footer(file: Path) -> pq.FileMetaData:
    """The footer of a file that can hold what it says. Raises errors of many kinds, as the library does."""
    footer = _footer(file)
    leaves_of(footer), footer.schema.to_arrow_schema().names
    check_footer(file, footer)
    return footer


def leaves_below(footer: pq.FileMetaData, columns: list[str]) -> list[int]:
    """The numbers of the leaves of some columns."""
    return [number for number, leaf in enumerate(leaves_of(footer)) if any(is_below(leaf, name) for name in columns)]


def leaves_of(footer: pq.FileMetaData) -> list[str]:
    """The path of each leaf column, such as `images.list.element.bytes`."""
    return [footer.schema.column(n).path for n in range(footer.num_columns)]


def is_below(leaf: str, column: str) -> bool:
    return leaf == column or leaf.startswith(f"{column}.")
