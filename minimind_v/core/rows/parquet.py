"""Rows of parquet files, the published data format: the rows contain the image bytes.

Parquet is read by row groups: a single row is expensive, and its neighbours are free. So rows are read in pieces: a
group, or a fraction of a large one. Pieces in use stay in memory, and `shuffled` needs each piece about once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows.cells import Picture, StoredPictures, decode_inline, pictures_of
from minimind_v.core.rows.field_names import PICTURES, READ, TALKS, is_readable, picture_field
from minimind_v.core.rows.file_rows import ShardedRows
from minimind_v.core.rows.parquet_pieces import (
    KEPT_PICTURES,
    KEPT_TEXT,
    MIXED_PICTURES,
    MIXED_TEXT,
    Pieces,
    checked_footer,
    is_below,
    leaves_of,
)
from minimind_v.core.rows.pictures import open_pictures
from minimind_v.core.rows.row import Row
from minimind_v.core.rows.splits import LEARN, shards_of
from minimind_v.core.rows.strangers import no_rows, stand_in
from minimind_v.core.rows.unread import refuse_unread
from minimind_v.core.wording import plural


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
        self._text = Pieces(files, footers, text, KEPT_TEXT)
        self._others = Pieces(files, footers, others, KEPT_TEXT) if others else None
        self._data = Pieces(files, footers, [self._bytes], KEPT_PICTURES) if self._bytes else None
        # How many pictures a row has, without their bytes.
        self._paths = Pieces(files, footers, [path_leaf], KEPT_TEXT) if self._bytes and path_leaf else None
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
                raise RowError(f"the text refers to {plural(count, 'image')}, the row has {len(cells)}", "placeholders")
            data, name = cells[data].data, cells[data].name or name
        return self._images.read(name) if data is None else decode_inline(data, name)

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Groups in random order, with the rows of neighbours in that order mixed.

        The pieces of a large group follow each other, since its reader starts at the beginning of the group.
        """
        columns = [(self._text, MIXED_TEXT), *([(self._data, MIXED_PICTURES)] if self._data else [])]
        rows = min(int(limit / max(pieces.sizes.sum() / len(self), 1)) for pieces, limit in columns)
        return columns[-1][0].shuffled(rng, max(rows, 1))


def _read_footer(file: Path) -> pq.FileMetaData:
    try:
        return checked_footer(file)
    except Exception as error:  # the library raises many kinds on damaged files
        problem = (
            stand_in(file)
            or no_rows(file)
            or f"not a parquet file ({' '.join(str(error).split())}) — download it again"
        )
        raise DataError(f"{file}: {problem}") from None


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
        number = next((n for n, leaf in enumerate(leaves_of(footer)) if _is_bytes_leaf(leaf, column)), None)
        for group in range(footer.num_row_groups if number is not None else 0):
            chunk = footer.row_group(group).column(number)
            counted = chunk.statistics is not None and chunk.statistics.has_null_count
            present = present or not counted or chunk.statistics.null_count < chunk.num_values
            nulls = nulls or not counted or chunk.statistics.null_count > 0
    return present, nulls


def _is_bytes_leaf(leaf: str, column: str) -> bool:
    return is_below(leaf, column) and (leaf == column or leaf.rsplit(".", 1)[-1] != "path")


def _path_leaf(footers: list[pq.FileMetaData], column: str) -> str:
    """The leaf of the pictures' paths, if every file has it; else empty."""
    leaves = [{leaf for leaf in leaves_of(footer) if is_below(leaf, column)} for footer in footers]
    common = set.intersection(*leaves)
    return next((leaf for leaf in sorted(common) if leaf.endswith(".path")), "")


def _unpack_extra(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"extra": text}
