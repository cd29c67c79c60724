"""Rows of parquet files, today's layout of the published data: pictures stand in the rows.

Parquet is read by row groups, so a row is dear and its neighbours are free. Rows are read in pieces: a group, or a part
of one that would be too large; the pieces in use stay in memory, and `shuffled` draws an order that needs each piece
about once.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minimind_v.core.data.pictures import open_pictures
from minimind_v.core.data.row import Row, as_messages, count_marks, image_names, parse_talk, picture_bytes
from minimind_v.core.data.splits import LEARN, Choice, shards_of
from minimind_v.core.data.strangers import no_rows, stand_in
from minimind_v.core.data.unread import refuse_unread
from minimind_v.core.errors import DataError, RowError

TALK = ("conversations", "messages")
PICTURES = ("image_bytes", "images", "image")  # columns that may hold pictures as bytes, the first that does counts
# Unpacked bytes of text and of pictures whose rows are mixed with each other, and that stay in memory: the loader reads
# along four lanes at a time, each in a mixture of its own.
MIXED_TEXT, MIXED_PICTURES = 4 * 2**20, 64 * 2**20
KEPT_TEXT, KEPT_PICTURES = 5 * MIXED_TEXT, 5 * MIXED_PICTURES
READERS = 8  # groups, or places in a large one, that are being read through at a time


class ParquetRows:
    """Rows of a parquet file, or of those below a folder that are of one split, in the order of their names."""

    def __init__(
        self, path: Path, images: Path | None = None, split: str | None = None, order: Sequence[str] = LEARN
    ) -> None:
        """`images` serves files that have the names of pictures only; `split` and `order` say which files of a folder.

        Raises DataError, MissingInput or UsageError.
        """
        self.path = path
        files, self.choice = shards_of(path, ".parquet", split, order) if path.is_dir() else ([path], Choice(""))
        footers = [_read_footer(file) for file in files]
        self.files = files
        schema = footers[0].schema.to_arrow_schema()
        for file, footer in zip(files, footers, strict=True):
            if footer.schema.to_arrow_schema().names != schema.names:
                raise DataError(f"{file}: other columns than {files[0]} has, so they are no shards of one set")
        self._talk = next((name for name in TALK if name in schema.names), "")
        if not self._talk:
            raise DataError(f"{files[0]}: no column `conversations`, only {', '.join(schema.names)}")
        self._bytes = next((name for name in PICTURES if name in schema.names and _holds_bytes(schema.field(name))), "")
        self._names = "image" if "image" in schema.names and self._bytes != "image" else ""
        self._images = open_pictures(None if self._bytes else images)
        binary = [name for name in schema.names if _holds_bytes(schema.field(name))]
        text = [name for name in schema.names if name not in binary]
        others = [name for name in binary if name != self._bytes]  # read only where a row seems to have no picture
        self.left_out = f"{path}: bytes in {', '.join(others)} are neither read nor copied" if others else ""
        self._text = _Pieces(files, footers, text, KEPT_TEXT)
        self._others = _Pieces(files, footers, others, KEPT_TEXT) if others else None
        self._data = _Pieces(files, footers, [self._bytes], KEPT_PICTURES) if self._bytes else None
        self._ends = np.cumsum([footer.num_rows for footer in footers])  # of each file, in rows
        if len(self) == 0:
            raise DataError(f"{path}: the file has no rows")

    @property
    def split(self) -> str:
        return self.choice.name

    @property
    def pictures(self) -> Path | None:
        return self._images.path

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, "right"))

    def number(self, index: int) -> int:
        file = self._file(index)
        return index + 1 - (int(self._ends[file - 1]) if file else 0)

    def place(self, index: int) -> str:
        return f"{self.files[self._file(index)]}:{self.number(index)}"

    def row(self, index: int) -> Row:
        found = self._text.row(index)
        conversations = found.pop(self._talk)
        if isinstance(conversations, str | bytes):
            conversations = parse_talk(conversations, self._talk)
        elif isinstance(conversations, list):  # a column of records gives every record every field
            conversations = [_without_nulls(message) for message in conversations]
        names = found.pop(self._names, None) if self._names else None
        extra = {key: value for key, value in found.items() if value is not None}
        if set(extra) == {"extra"} and isinstance(extra["extra"], str):
            extra = _unpack_extra(extra["extra"])
        messages = as_messages(conversations)
        told = image_names(names)
        if not told and self._data:
            # As many as the text has marks; `picture` finds out whether that is so. Only a row without marks has its
            # pictures counted here, since nobody would ask for one of them.
            marks = count_marks(messages) or len(self._cells(index))
            told = [f"picture {n}" for n in range(1, marks + 1)]
        others = self._others.row(index) if self._others and not told else None
        return refuse_unread(Row(messages, told, extra), others)

    def _cells(self, index: int) -> list[Any]:
        """What the row has of pictures."""
        assert self._data is not None
        cell = self._data.row(index)[self._bytes]
        cells = cell if isinstance(cell, list) else [cell]
        return [one for one in cells if one is not None and one != b""]

    def picture(self, index: int, position: int, name: str) -> bytes:
        if self._data is not None:
            cells, told = self._cells(index), len(self.row(index).images)
            if len(cells) != told:
                raise RowError(f"the text speaks of {told} pictures, the row has {len(cells)}", "placeholders")
            return picture_bytes(cells[position], name)
        return self._images.read(name)

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Groups in any order, the rows of neighbours in that order mixed.

        The parts of a group that is too large for memory follow each other, since reading starts at its beginning.
        """
        parts = [(self._text, MIXED_TEXT), *([(self._data, MIXED_PICTURES)] if self._data else [])]
        rows = min(int(bytes_ / max(part.sizes.sum() / len(self), 1)) for part, bytes_ in parts)
        return parts[-1][0].shuffled(rng, max(rows, 1))


class _Pieces:
    """Some columns of parquet files, read piece by piece; each process has files and pieces of its own."""

    def __init__(self, files: list[Path], footers: list[pq.FileMetaData], columns: list[str], kept: int) -> None:
        self.files, self.columns, self.kept = files, columns, kept
        wanted = {number for number, name in enumerate(_leaves(footers[0])) if name in columns}
        groups, starts, sizes = [], [], []  # of each piece: file and group and part, first row, unpacked bytes
        row = 0
        for file, footer in enumerate(footers):
            for number in range(footer.num_row_groups):
                group = footer.row_group(number)
                size = sum(group.column(n).total_uncompressed_size for n in wanted)
                parts = max(1, min(-(-size // (kept // 8)), group.num_rows))
                rows = -(-group.num_rows // parts) or 1
                for part, first in enumerate(range(0, group.num_rows, rows)):
                    groups.append((file, number, part, rows))
                    starts.append(row + first)
                    sizes.append(size // parts)
                row += group.num_rows
        self.rows = row
        self.groups = np.array(groups, np.int64).reshape(-1, 4)
        self.starts, self.sizes = np.array(starts, np.int64), np.array(sizes, np.int64)
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._kept: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._footers: dict[int, pq.FileMetaData] = {}
        self._going: dict[int, Iterator[pa.RecordBatch]] = {}  # the piece that each reader would give next

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict(), "_going": {}, "_footers": {}}

    def row(self, index: int) -> dict[str, Any]:
        piece, place = self._piece(index)
        return {name: piece.column(name)[place].as_py() for name in self.columns}

    def _piece(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The piece of a row and the row's place in it. Raises RowError where the file is damaged there."""
        if self._pid != os.getpid():
            self._forget()
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        if number not in self._kept:
            try:
                self._kept[number] = self._read(number)
            except (pa.ArrowException, OSError) as error:
                file = self.files[self.groups[number, 0]]
                text = " ".join(str(error).split())
                raise RowError(
                    f"damaged in {file.name}, row group {self.groups[number, 1]} ({text})", "parquet"
                ) from None
            self._drop()
        self._kept.move_to_end(number)
        return self._kept[number], index - int(self.starts[number])

    def _read(self, number: int) -> pa.RecordBatch:
        """Read on in the group to this piece, or from the group's beginning where it lies behind."""
        file, group, part, rows = (int(value) for value in self.groups[number])
        at = max((piece for piece in self._going if number - part <= piece <= number), default=None)
        if at is None:
            # Without buffering ahead, and without threads, which a fork would not inherit.
            footer = self._footers.get(file) or self._footers.setdefault(file, _footer(self.files[file]))
            source = pq.ParquetFile(source_of(self.files[file]), metadata=footer, buffer_size=2**20, pre_buffer=False)
            at, reader = number - part, source.iter_batches(rows, [group], self.columns, use_threads=False)
        else:
            reader = self._going.pop(at)
        for _ in range(at, number):
            next(reader, None)
        found = next(reader, None)
        if found is None:
            raise pa.ArrowInvalid("fewer rows than the file says")
        if number + 1 < len(self.groups) and self.groups[number + 1, 2]:  # the group goes on
            self._going[number + 1] = reader
            if len(self._going) > READERS:
                del self._going[next(iter(self._going))]
        return found

    def _drop(self) -> None:
        """Leave out what was not asked for longest, where all together are too much."""
        held = sum(int(self.sizes[number]) for number in self._kept)
        while held > self.kept and len(self._kept) > 1:
            number, _ = self._kept.popitem(last=False)
            held -= int(self.sizes[number])

    def shuffled(self, rng: np.random.Generator, together: int) -> np.ndarray:
        """A permutation of all rows that mixes about so many with each other."""
        firsts = np.flatnonzero(self.groups[:, 2] == 0)
        ends, bounds = np.append(firsts[1:], len(self.groups)), np.append(self.starts, self.rows)
        pieces = [piece for n in rng.permutation(len(firsts)) for piece in range(firsts[n], ends[n])]
        order = np.empty(self.rows, np.int64)
        begin = end = 0  # of the mixture in the making
        for piece in pieces:
            count = bounds[piece + 1] - bounds[piece]
            if end - begin + count > together:
                rng.shuffle(order[begin:end])
                begin = end
            order[end : end + count] = np.arange(bounds[piece], bounds[piece + 1])
            end += count
        rng.shuffle(order[begin:end])
        return order


def source_of(file: Path) -> Path | BinaryIO:
    """What pyarrow can open: it takes names of files that are UTF-8 only."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return file.open("rb")
    return file


def _footer(file: Path) -> pq.FileMetaData:
    return pq.read_metadata(source_of(file))


def _read_footer(file: Path) -> pq.FileMetaData:
    try:
        return _footer(file)
    except (pa.ArrowException, OSError) as error:
        found = (
            stand_in(file)
            or no_rows(file)
            or f"not a parquet file ({' '.join(str(error).split())}) — download it again"
        )
        raise DataError(f"{file}: {found}") from None


def _leaves(footer: pq.FileMetaData) -> list[str]:
    """The column that each of a group's stretches of data belongs to."""
    return [footer.schema.column(n).path.split(".")[0] for n in range(footer.num_columns)]


def _holds_bytes(column: pa.Field) -> bool:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _without_nulls(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None}


def _unpack_extra(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"extra": text}
