"""Rows of files of JSON, found by their offsets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows.field_names import READ
from minimind_v.core.rows.file_rows import FileRows
from minimind_v.core.rows.index import Index, columns
from minimind_v.core.rows.json_layout import (
    CHUNK,
    LINES,
    OTHER,
    ROW_LIMIT,
    VALUES_LIMIT,
    Layout,
    find_elements,
    find_layout,
    refuse_many_values,
)
from minimind_v.core.rows.row import OpenedRows, Row
from minimind_v.core.rows.strangers import no_rows, stand_in

BOM = b"\xef\xbb\xbf"


def open_json(path: Path, images: Path | None = None) -> OpenedRows:
    """Open rows in a JSON file of any layout. Raises DataError or MissingInput."""
    layout = find_layout(path)
    if layout.kind == OTHER and path.suffix == ".json":
        raise DataError(
            f"{path}: one JSON object with {layout.key:.200}, which is neither a row nor a list of rows (it does not "
            f"start with [) — a row needs {READ}"
        )
    return JsonlRows(path, images) if layout.kind in (LINES, OTHER) else LlavaRows(path, layout, images)


class TextRows(FileRows):
    """Rows at offsets of a text file."""

    kind: str  # of the index

    def __init__(self, path: Path, images: Path | None = None) -> None:
        """Raises MissingInput, or DataError where the file is something else or empty."""
        if problem := stand_in(path) or no_rows(path):
            raise DataError(f"{path}: {problem}")
        self.path = path
        self._index = Index(path, self.kind, self._find_rows)
        if len(self._index) == 0:
            raise DataError(f"{path}: the file has no rows")
        super().__init__(path, images)

    def __len__(self) -> int:
        return len(self._index)

    def _find_rows(self) -> np.ndarray:
        """Two numbers per row, [2, rows], the first of them its offset."""
        raise NotImplementedError

    def _parse(self, data: bytes) -> Row:
        if len(data) > ROW_LIMIT:
            raise RowError(f"the row is longer than {ROW_LIMIT:,} bytes", "json")
        if len(data) > VALUES_LIMIT:
            refuse_many_values(data)
        try:
            fields = json.loads(data.decode("utf-8-sig"))
        except json.JSONDecodeError as error:  # its text names line 1
            reason = error.msg.removesuffix(" at")  # the end of some of its messages
            raise RowError(f"not JSON ({reason} at character {error.pos + 1}){_array(data)}", "json") from None
        except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5000 digits, nested too deeply
            raise RowError(f"not JSON ({error})", "json") from None
        if not isinstance(fields, dict):
            raise RowError(f"not a JSON object{_array(data)}", "json")
        return self.read(fields)


def _array(data: bytes) -> str:
    return " — rows in one array belong in a .json file" if data.lstrip().startswith(b"[") else ""


class JsonlRows(TextRows):
    """Rows of a JSONL file. The index keeps offset and line of each: 16 bytes."""

    kind = "JSONL rows: offset, line"
    file_kind = "JSONL"

    def number(self, index: int) -> int:
        return int(self._index.array[1, index])

    def row(self, index: int) -> Row:
        self.handle.seek(int(self._index.array[0, index]))
        return self._parse(self.handle.readline(ROW_LIMIT + 1))

    def _find_rows(self) -> np.ndarray:
        with self.path.open("rb") as file:
            return columns(_filled_lines(file))


def _filled_lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Offset and number (from 1) of every line that is not blank; a long one is read in pieces."""
    begin = end = len(BOM) if file.read(len(BOM)) == BOM else 0
    file.seek(begin)
    number, blank = 1, True
    while piece := file.readline(CHUNK):
        blank = blank and not piece.strip()
        end += len(piece)
        if piece.endswith(b"\n"):
            if not blank:
                yield begin, number
            begin, number, blank = end, number + 1, True
    if not blank:
        yield begin, number


class LlavaRows(TextRows):
    """Rows of one JSON array, as in LLaVA's data, or of JSON objects one after the other."""

    file_kind = "JSON"

    def __init__(self, path: Path, layout: Layout, images: Path | None = None) -> None:
        """Raises MissingInput, or DataError where the file is something else or is empty."""
        self._layout = layout
        self.kind = f"JSON {layout.kind} from byte {layout.begin}: offset, length"
        super().__init__(path, images)

    def row(self, index: int) -> Row:
        offset, length = (int(number) for number in self._index.array[:, index])
        self.handle.seek(offset)
        return self._parse(self.handle.read(min(length, ROW_LIMIT + 1)))

    def _find_rows(self) -> np.ndarray:
        """Offset and length in bytes of every row."""
        try:
            return columns(find_elements(self.path, self._layout))
        except (ValueError, RecursionError, RowError) as error:
            raise DataError(f"{self.path}: not a JSON array of rows ({error})") from None
