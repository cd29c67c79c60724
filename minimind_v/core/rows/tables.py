"""Rows of CSV and TSV files: a line of column names, then one record per row; quoted cells may contain line breaks."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows.field_names import ALTERNATIVES, CAPTIONS, PICTURES, QUESTIONS, READ, TALKS, is_readable
from minimind_v.core.rows.index import columns
from minimind_v.core.rows.jsonl import BOM, TextRows
from minimind_v.core.rows.row import Row
from minimind_v.core.rows.unread import FILE
from minimind_v.core.wording import plural

RECORD_LIMIT = 2**25  # bytes of a record; a longer record has an open quote
PIECE = 2**20  # bytes of a too long line that are read together
BLANK = b"\r\n"
SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
TEXTS = {*CAPTIONS, *QUESTIONS, *(key for keys in QUESTIONS.values() for key in keys)}
KEYS = {*TALKS, "texts", *TEXTS, *PICTURES, *ALTERNATIVES}  # also recognised in capitals
SINGLE = {key for key in TEXTS if not key.endswith("s")}  # columns of text, where brackets are not JSON
QUOTED_NAMES = re.compile(r"\[\s*'[^'\"]*'(?:\s*,\s*'[^'\"]*')*\s*\]")  # a list as Python prints it


class CsvRows(TextRows):
    """Rows of a CSV or TSV file. The index keeps offset and line of each: 16 bytes."""

    kind = "CSV records: offset, line"

    def __init__(self, path: Path, images: Path | None = None) -> None:
        """Raises MissingInput, or DataError where the file is something else, has no column names or is empty."""
        super().__init__(path, images)
        assert self._columns

    @property
    def file_kind(self) -> str:  # type: ignore[override]
        return "TSV" if self._separator == "\t" else "CSV"

    def number(self, index: int) -> int:
        return int(self._index.array[1, index])

    def row(self, index: int) -> Row:
        return self.read(self._fields(self._record(index)))

    @cached_property
    def _first_line(self) -> bytes:
        """The first line that is not blank. Raises DataError."""
        with self.path.open("rb") as file:
            data = file.read(PIECE)
        line, end, _ = data.removeprefix(BOM).lstrip(BLANK).partition(b"\n")
        if not end and len(data) == PIECE:
            raise DataError(f"{self.path}: its first line is too long, so it has no column names")
        return line

    @cached_property
    def _separator(self) -> str:
        """The most frequent separator of the first line."""
        bare = re.sub(r'"[^"]*"', "", self._first_line.decode("latin-1"))
        return max(SEPARATORS, key=bare.count)  # tabs for a single column, which has no separator

    @cached_property
    def _columns(self) -> list[str]:
        """The names of the columns; an unnamed column has an empty name. Raises DataError."""
        where = f"{self.path}: its first line"
        try:
            cells = next(csv.reader([self._first_line.decode()], delimiter=self._separator, strict=True), [])
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 ({error}) — save the file as UTF-8") from None
        except csv.Error as error:
            raise DataError(f"{where} is not a line of column names ({error})") from None
        names = [cell.strip() for cell in cells]
        names = [name.lower() if name.lower() in KEYS else name for name in names]
        if twice := sorted(name for name, count in Counter(names).items() if name and count > 1):
            raise DataError(f"{where} names {', '.join(twice):.300} twice")
        if not is_readable(names):
            if any(FILE.fullmatch(name) or name[:1] in ("{", "[") for name in names):
                raise DataError(f"{where} is a row — add a line of column names above it, such as image,caption")
            listed = ", ".join(filter(None, names)) or "nothing"
            raise DataError(f"{where} names {listed:.300}, so there is no conversation — a row needs {READ}")
        return names

    def _find_rows(self) -> np.ndarray:
        """Offset and line number (from 1) of every record but the first, which names the columns."""
        assert self._columns
        with self.path.open("rb") as file:
            return columns(_records(file, self._separator))[:, 1:]

    def _record(self, index: int) -> bytes:
        offsets = self._index.array[0]
        begin = int(offsets[index])
        length = int(offsets[index + 1]) - begin if index + 1 < len(self) else -1
        self.handle.seek(begin)
        data: bytes = self.handle.read(min(length, RECORD_LIMIT + 1) if length >= 0 else RECORD_LIMIT + 1)
        if len(data) > RECORD_LIMIT:
            raise RowError(f"a record of more than {RECORD_LIMIT:,} bytes", "csv")
        return data

    def _fields(self, data: bytes) -> dict[str, Any]:
        """The cells of a record by the names of their columns. Raises RowError."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(f"not UTF-8 ({error}) — save the file as UTF-8", "csv") from None
        names, cells = self._columns, self._cells(text)
        while len(cells) > len(names) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(names):
            quote = f" (put a text that contains {SEPARATORS[self._separator]} in quotes)"
            raise RowError(
                f"{plural(len(cells), 'cell')} for {plural(len(names), 'column')}{quote * (len(cells) > len(names))}",
                "csv",
            )
        return {name: _value(name, cell) for name, cell in zip(names, cells, strict=True) if name}

    def _cells(self, text: str) -> list[str]:
        try:
            csv.field_size_limit(RECORD_LIMIT)
            return next(csv.reader(io.StringIO(text, newline="\n"), delimiter=self._separator, strict=True), [])
        except csv.Error as error:
            trouble = str(error)
        if self._separator == "\t":  # many TSV files do not quote: a quote is a letter
            cells = text.rstrip("\r\n").split("\t")
            if len(cells) == len(self._columns):
                return cells
        if trouble == "unexpected end of data":
            trouble = 'a quote (") is not closed'
        raise RowError(f"not {self.file_kind} ({trouble})", "csv")


def _records(file: BinaryIO, separator: str) -> Iterator[tuple[int, int]]:
    """Offset and line of every record that is not blank. A broken record ends at its first line."""
    csv.field_size_limit(RECORD_LIMIT)
    begin, line = len(BOM) if file.read(len(BOM)) == BOM else 0, 1
    while True:
        file.seek(begin)
        end = [begin]  # of the lines read
        reader = csv.reader(_lines(file, end), delimiter=separator, strict=True)
        try:
            first = line
            for cells in reader:
                if cells:
                    yield begin, line
                begin, line = end[0], first + reader.line_num
            return
        except csv.Error:
            yield begin, line
            file.seek(begin)
            while data := file.readline(PIECE):
                begin += len(data)
                if data.endswith(b"\n"):
                    break
            line += 1


def _lines(file: BinaryIO, end: list[int]) -> Iterator[str]:
    """The lines of a file, a character per byte; `end` receives the offset of the end of the last line."""
    while data := file.readline(RECORD_LIMIT + 1):
        if len(data) > RECORD_LIMIT:
            raise csv.Error("the line is too long")
        end[0] += len(data)
        yield data.decode("latin-1")


def _value(name: str, cell: str) -> Any:
    """A cell: None if empty, a list or a record if it is JSON and not in a column of text."""
    text = cell.strip()
    if not text:
        return None
    if name in SINGLE or name in TALKS or text[0] + text[-1] not in ("[]", "{}"):
        return cell
    if QUOTED_NAMES.fullmatch(text):
        text = text.replace("'", '"')
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return cell
