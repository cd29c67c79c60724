"""The layout of rows in a JSON file: one per line, an array, one after the other, or an array under a key.

The ending of a file does not decide: lines may be saved as .json, and arrays as .jsonl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from minimind_v.core.errors import RowError
from minimind_v.core.rows.field_names import TALKS
from minimind_v.core.rows.forms import FORMS

CHUNK = 2**22  # bytes that the search for rows reads together
ROW_LIMIT = 2**26  # bytes of one row, with the pictures in it
VALUES_LIMIT = 2**20  # lists and records in one row: as Python objects each takes a hundred bytes
HEAD = 2**16  # bytes that usually show the layout

LINES, ARRAY, OBJECTS = "lines", "array", "objects"
OTHER = "other"  # one object that is neither a row nor has a list of rows
DECODER = json.JSONDecoder()
GAP, SPACE = re.compile(r"[\s,]*"), re.compile(r"\s*")
_WIDE = "\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"  # spaces in UTF-8
GAP_BYTES = re.compile(f"(?a:[\\s,]|{_WIDE})*")  # a gap, a character per byte
QUOTE_OR_BRACKET, QUOTE_OR_ESCAPE = re.compile(r'["\[\]{}]'), re.compile(r'["\\]')


@dataclass(frozen=True)
class Layout:
    """The layout of rows in a file, and the byte at which their search begins."""

    kind: str
    begin: int = 0
    key: str = ""  # of the array in an object, or all keys of an object without one


def find_layout(path: Path) -> Layout:
    """The layout of rows in a JSON file. An undecided file counts as lines, so that errors name the line."""
    with path.open("rb") as file:
        head = b""
        for size in (HEAD, CHUNK):
            head += file.read(size - len(head))
            layout = _layout(head, len(head) < size)
            if layout is not None:
                return layout
    return Layout(LINES)


def _layout(head: bytes, whole: bool) -> Layout | None:
    """The layout that the beginning of a file shows; None where more of the file may show it."""
    data = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    begin = len(head) - len(data)
    if data.startswith(b"["):
        return Layout(ARRAY, begin + 1)
    if not data.startswith(b"{"):
        return Layout(LINES)
    text = data.decode("utf-8", "surrogateescape")
    try:
        value, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        if below := _array_below(text, begin):
            return below
        return Layout(LINES) if whole else None
    layout = Layout(OBJECTS, begin) if "\n" in text[:end] else Layout(LINES)
    if _is_row(value) or not whole or text[end:].strip():
        return layout
    if sum(isinstance(inner, list) and bool(inner) and _is_row(inner[0]) for inner in value.values()) == 1:
        return _array_below(text, begin)
    return Layout(OTHER, key=", ".join(value))


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and any(matches(value) for matches, _ in FORMS)


def _array_below(text: str, begin: int) -> Layout | None:
    """The first array of rows below a key of the object at the start of a text."""
    at = 1
    while True:
        try:
            key, at = DECODER.raw_decode(text, GAP.match(text, at).end())  # type: ignore[union-attr]
            colon = SPACE.match(text, at).end()  # type: ignore[union-attr]
            at = SPACE.match(text, colon + 1).end()  # type: ignore[union-attr]
            if text[colon : colon + 1] != ":" or not isinstance(key, str) or key in TALKS:
                return None
            if text.startswith("[", at):
                first = SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
                if text.startswith("{", first) and _is_row(DECODER.raw_decode(text, first)[0]):
                    return Layout(ARRAY, begin + len(text[: at + 1].encode("utf-8", "surrogateescape")), key)
            _, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None


class JsonText:
    """The text of a JSON file, read in pieces, a character per byte."""

    def __init__(self, file: BinaryIO, begin: int = 0) -> None:
        file.seek(begin)
        self.file = file
        self.text, self.at = "", 0  # the text in memory, and the position in it
        self._begin = begin  # offset of that text in the file

    @property
    def offset(self) -> int:
        """The position in the file."""
        return self._begin + self.at

    def more(self, size: int) -> bool:
        """Drop the text before the position and read more; return whether there was more."""
        data = self.file.read(size)
        self.text, self._begin, self.at = self.text[self.at :] + data.decode("latin-1"), self.offset, 0
        return bool(data)

    def next(self) -> str:
        """The next character that is not a gap, without taking it; empty at the end."""
        while True:
            self.at = GAP_BYTES.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at + 3 <= len(self.text) or not self.more(CHUNK):  # a space may have 3 bytes
                return self.text[self.at : self.at + 1]


def find_elements(path: Path, layout: Layout) -> Iterator[tuple[int, int]]:
    """Offset and length of each row of an array, or of objects one after the other.

    The decoder finds the end of an element; a broken element ends at its closing bracket. Raises ValueError.
    """
    with path.open("rb") as file:
        source = JsonText(file, layout.begin)
        while True:
            mark = source.next()
            if layout.kind == ARRAY and mark == "]":
                source.at += 1
                _check_end(source, layout)
                return
            if layout.kind == OBJECTS and not mark:
                return
            yield source.offset, _skip_element(source)


def _skip_element(source: JsonText) -> int:
    """Move behind an element, and return its length. Raises ValueError."""
    while True:
        end, trouble = _element_end(source.text, source.at)
        if end is not None:
            length, source.at = end - source.at, end
            return length
        rest = len(source.text) - source.at
        if rest > ROW_LIMIT:
            trouble = f"more than {ROW_LIMIT:,} bytes"
        elif source.more(min(max(CHUNK, rest), ROW_LIMIT + CHUNK - rest)):
            if len(source.text) > 2 * CHUNK:
                refuse_many_values(source.text.encode("latin-1"))
            continue
        raise ValueError(f"{trouble}, in the element that begins at byte {source.offset}")


def _element_end(text: str, at: int) -> tuple[int | None, str]:
    """The position behind an element; None, and the reason, where it does not end in this text."""
    try:
        _, end = DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        balanced = _balanced_end(text, at)
        follows = "" if balanced is None else text[balanced : balanced + 1]
        if balanced is None or not (follows.isspace() or follows in ",]{"):
            return None, error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return balanced, ""
    if end == len(text) and text[at] not in '{["':  # a number may continue
        return None, "the array does not end"
    return end, ""


def _balanced_end(text: str, at: int) -> int | None:
    """The position behind the closing bracket of an opening one; None without one, or where it does not close."""
    if text[at : at + 1] not in ("{", "["):
        return None
    depth = 0
    while (match := QUOTE_OR_BRACKET.search(text, at)) is not None:
        at = match.end()
        if match[0] == '"':
            while (inner := QUOTE_OR_ESCAPE.search(text, at)) is not None and inner[0] == "\\":
                at = inner.end() + 1
            if inner is None:
                return None
            at = inner.end()
            continue
        depth += 1 if match[0] in "{[" else -1
        if depth == 0:
            return at
    return None


def _check_end(source: JsonText, layout: Layout) -> None:
    """Raises ValueError for data behind an array that is not the rest of its object."""
    offset = source.offset
    behind = source.text[source.at :].encode("latin-1") + source.file.read(ROW_LIMIT if layout.key else CHUNK)
    if not layout.key:
        if behind.strip():
            raise ValueError(f"extra data after its end, at byte {offset}")
        return
    try:
        refuse_many_values(behind)
        json.loads(b'{"":0' + behind)
    except (ValueError, RecursionError, RowError):
        raise ValueError(f"the object around `{layout.key}` is not a complete object, from byte {offset} on") from None


def refuse_many_values(data: bytes) -> None:
    """Raises RowError where a row would be millions of Python objects."""
    if data.count(b"{") + data.count(b"[") > VALUES_LIMIT:
        raise RowError(f"more than {VALUES_LIMIT:,} lists and records in one row", "json")
