"""Rows of parquet files, the published data format: the rows contain the image bytes.

Parquet is read by row groups: a single row is expensive, and its neighbours are free. So rows are read in pieces: a
group, or a fraction of a large one. Pieces in use stay in memory, and `shuffled` needs each piece about once.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows.cells import Picture, StoredPictures, decode_inline, pictures_of
from minimind_v.core.rows.field_names import PICTURES, READ, TALKS, is_readable, picture_field
from minimind_v.core.rows.file_rows import ShardedRows
from minimind_v.core.rows.parquet_bounds import BATCH_LIMIT, check_footer, dictionary_size
from minimind_v.core.rows.pictures import open_pictures
from minimind_v.core.rows.row import Row
from minimind_v.core.rows.splits import LEARN, shards_of
from minimind_v.core.rows.strangers import no_rows, stand_in
from minimind_v.core.rows.unread import refuse_unread

# Unpacked bytes of text and of pictures whose rows are mixed with each other, and that stay in memory: the loader reads
# four lanes at a time, each in a mixture of its own.
MIXED_TEXT, MIXED_PICTURES = 4 * 2**20, 64 * 2**20
KEPT_TEXT, KEPT_PICTURES = 5 * MIXED_TEXT, 5 * MIXED_PICTURES
READERS = 8  # open readers, each of one group


class ParquetRows(ShardedRows):
    """Rows of a parquet file, or of the files of one split below a folder, in the order of their names."""

    file_kind = "parquet"

    def __init__(
        self, path: Path, images: Path | None = None, split: str | None = None, order: Sequence[str] = LEARN
    ) -> None:
        """`images` holds pictures that the rows only name; `split` and `order` select the files of a folder.

        Raises DataError, MissingInput or UsageError.
        """
        self.path = path
        self.files, self.choice = shards_of(path, ".parquet", split, order)
        files = self.files
        footers = [_read_footer(file) for file in files]
        schema = _common_schema(files, footers)
        binary = columns_of_bytes(files[0], schema)
        self._bytes = picture_field(binary) or ""
        text = [name for name in schema.names if name not in binary]
        self._single, self._nulls, path_leaf = True, False, ""  # of the column of pictures: one each, some are null
        if self._bytes:
            self._single = not _is_list(schema.field(self._bytes).type)
            present, self._nulls = _count_bytes(footers, self._bytes)
            path_leaf = _path_leaf(footers, self._bytes)
            if path_leaf and not present:  # names, and no bytes at all
                text.append(path_leaf)
                binary.remove(self._bytes)
                self._bytes = ""
        # Another field may name the pictures, and counts before that of the bytes.
        named = self._bytes not in PICTURES and not set(PICTURES).isdisjoint(text)
        self._images = open_pictures(images if not self._bytes or self._nulls or named else None)
        others = [name for name in binary if name != self._bytes]  # read only for a row without a picture
        self.left_out = f"{path}: the bytes in {', '.join(others)} are ignored and not copied" if others else ""
        if self._bytes and self._bytes not in PICTURES:
            others.append(self._bytes)  # the text may have no mark for its pictures
        self._text = _Pieces(files, footers, text, KEPT_TEXT)
        self._others = _Pieces(files, footers, others, KEPT_TEXT) if others else None
        self._data = _Pieces(files, footers, [self._bytes], KEPT_PICTURES) if self._bytes else None
        # How many pictures a row has, without their bytes.
        self._paths = _Pieces(files, footers, [path_leaf], KEPT_TEXT) if self._bytes and path_leaf else None
        self._ends = np.cumsum([footer.num_rows for footer in footers])  # of each file, in rows
        if len(self) == 0:
            raise DataError(f"{path}: the file has no rows")

    def row(self, index: int) -> Row:
        fields = {name: value for name, value in self._text.row(index).items() if value is not None}
        if self._bytes:
            fields[self._bytes] = StoredPictures(lambda: self._count(index))
        row = self.read(fields)
        row.extra.pop(self._bytes, None)  # of a row with its pictures elsewhere, or none
        if len(row.extra) == 1 and isinstance(text := row.extra.get("extra"), str):
            row = replace(row, extra=_unpack_extra(text))
        if not row.images:
            refuse_unread(row, self._others.row(index) if self._others else None)
        return row

    def _count(self, index: int) -> int:
        """The number of pictures of a row; reads their bytes only if nothing else shows it."""
        if self._nulls or not (self._single or self._paths):
            return len(self._cells(index))
        paths = [] if self._single or self._paths is None else self._paths.row(index)[self._bytes]
        return 1 if self._single else len(paths or [])

    def _cells(self, index: int) -> Sequence[Picture]:
        """The pictures of a row."""
        assert self._data is not None
        return pictures_of(self._data.row(index)[self._bytes], self._bytes)

    def picture(self, index: int, position: int, name: str) -> bytes:
        inline = self.row(index).inline
        data = inline.get(position)
        if isinstance(data, int):
            cells, count = self._cells(index), len({number for number in inline.values() if isinstance(number, int)})
            if len(cells) != count:
                raise RowError(f"the text refers to {count} images, the row has {len(cells)}", "placeholders")
            data, name = cells[data].data, cells[data].name or name
        return self._images.read(name) if data is None else decode_inline(data, name)

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Groups in random order, with the rows of neighbours in that order mixed.

        The pieces of a large group follow each other, since its reader starts at the beginning of the group.
        """
        columns = [(self._text, MIXED_TEXT), *([(self._data, MIXED_PICTURES)] if self._data else [])]
        rows = min(int(limit / max(pieces.sizes.sum() / len(self), 1)) for pieces, limit in columns)
        return columns[-1][0].shuffled(rng, max(rows, 1))


class _Pieces:
    """Some columns of parquet files, read piece by piece; each process has its own files and pieces."""

    def __init__(self, files: list[Path], footers: list[pq.FileMetaData], columns: list[str], kept: int) -> None:
        self.files, self.columns, self.kept = files, columns, kept
        names = footers[0].schema.to_arrow_schema().names
        self.names = [column if column in names else column.partition(".")[0] for column in columns]
        pieces = []  # of each: file, group, number in the group, rows, first row, unpacked bytes
        row = 0
        for file, footer in enumerate(footers):
            leaves = _leaves_below(footer, columns)
            for number in range(footer.num_row_groups):
                group = footer.row_group(number)
                size = sum(group.column(n).total_uncompressed_size for n in leaves)
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
        leaves = _leaves_below(footer, self.columns)
        together = BATCH_LIMIT // max(1, dictionary_size(path, footer.row_group(group), leaves))
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


def _read_footer(file: Path) -> pq.FileMetaData:
    try:
        footer = _footer(file)
        _leaves(footer), footer.schema.to_arrow_schema().names
        check_footer(file, footer)
    except Exception as error:  # the library raises many kinds on damaged files
        problem = (
            stand_in(file)
            or no_rows(file)
            or f"not a parquet file ({' '.join(str(error).split())}) — download it again"
        )
        raise DataError(f"{file}: {problem}") from None
    return footer


def _leaves_below(footer: pq.FileMetaData, columns: list[str]) -> list[int]:
    """The numbers of the leaves of some columns."""
    return [number for number, leaf in enumerate(_leaves(footer)) if any(_is_below(leaf, name) for name in columns)]


def _leaves(footer: pq.FileMetaData) -> list[str]:
    """The path of each leaf column, such as `images.list.element.bytes`."""
    return [footer.schema.column(n).path for n in range(footer.num_columns)]


def _is_below(leaf: str, column: str) -> bool:
    return leaf == column or leaf.startswith(f"{column}.")


def _common_schema(files: list[Path], footers: list[pq.FileMetaData]) -> pa.Schema:
    """The columns of all files, in the order of the first. Raises DataError where the files are not one data set."""
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    first = schemas[0]
    for file, schema in zip(files, schemas, strict=True):
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{file}: two of its columns have one name")
        if different := sorted(set(schema.names) ^ set(first.names)):
            raise DataError(
                f"{file}: its columns differ from those of {files[0]}, so the files are not one data set "
                f"({', '.join(different)} in one of them only)"
            )
        for name in first.names:
            kinds = first.field(name).type, schema.field(name).type
            if _holds_bytes(kinds[0]) != _holds_bytes(kinds[1]) and not any(map(pa.types.is_null, kinds)):
                raise DataError(
                    f"{file}: `{name}` is {kinds[1]}, and {kinds[0]} in {files[0]}, so the files are not one data set"
                )
    # A column that is empty in the first file has no type there.
    typed = [
        next((s.field(n) for s in schemas if not pa.types.is_null(s.field(n).type)), first.field(n))
        for n in first.names
    ]
    return pa.schema(typed)


def columns_of_bytes(where: Path, schema: pa.Schema) -> list[str]:
    """The columns that hold bytes. Raises DataError where no form of rows has such columns."""
    if not is_readable(schema.names):
        raise DataError(f"{where}: no column `conversations`, only {', '.join(schema.names)} — a row needs {READ}")
    return [name for name in schema.names if _holds_bytes(schema.field(name).type) and name not in TALKS]


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in tests) or (types.is_struct(kind) and any(_is_list(field.type) for field in kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds pictures as bytes: plain, in lists, or as `bytes` of records."""
    types = pa.types
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    if _is_list(kind) or types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(test(kind) for test in tests)


def _count_bytes(footers: list[pq.FileMetaData], column: str) -> tuple[bool, bool]:
    """Whether a column holds any bytes, and whether some may be null, judged by the footers."""
    present = nulls = False
    for footer in footers:
        number = next((n for n, leaf in enumerate(_leaves(footer)) if _is_bytes_leaf(leaf, column)), None)
        for group in range(footer.num_row_groups if number is not None else 0):
            chunk = footer.row_group(group).column(number)
            counted = chunk.statistics is not None and chunk.statistics.has_null_count
            present = present or not counted or chunk.statistics.null_count < chunk.num_values
            nulls = nulls or not counted or chunk.statistics.null_count > 0
    return present, nulls


def _is_bytes_leaf(leaf: str, column: str) -> bool:
    return _is_below(leaf, column) and (leaf == column or leaf.rsplit(".", 1)[-1] != "path")


def _path_leaf(footers: list[pq.FileMetaData], column: str) -> str:
    """The leaf of the pictures' paths, if every file has it; else empty."""
    leaves = [{leaf for leaf in _leaves(footer) if _is_below(leaf, column)} for footer in footers]
    common = set.intersection(*leaves)
    return next((leaf for leaf in sorted(common) if leaf.endswith(".path")), "")


def _unpack_extra(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"extra": text}
