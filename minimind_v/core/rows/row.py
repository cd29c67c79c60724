"""One row of training data, independent of its file format, and the interface of row stores."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minimind_v.core.errors import RowError
from minimind_v.core.rows.splits import Choice

PICTURE_LIMIT = 256 * 2**20  # bytes of one picture's file, or that a member of a zip may unpack to
NO_NAME = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters and half characters
PICTURE_NAME = re.compile(r"\.(a?png|avif|bmp|gif|hei[cf]|jfif|jp2|jpe?g?|mpo|p[bgpn]m|tga|tiff?|webp)\s*$", re.I)
IMAGE_MARK = "<image>"  # in a message: here goes a picture
NUMBERED = re.compile(r"picture \d+")  # what a picture without a name is called

# What is said of rows that are read in another way than they are written: no problem, but worth to be known.
ANSWER_FIRST = "began with an answer"
MARK_PER_TURN = "one picture, a mark in every turn"
SEVERAL_CAPTIONS = "several captions, the first is read"
SEVERAL_ANSWERS = "several answers, the first is read"
NOTES = {  # and what is done with such rows
    ANSWER_FIRST: "begin with an answer without a question; it is not used",
    MARK_PER_TURN: f"have one image and {IMAGE_MARK} in every question; only the first {IMAGE_MARK} counts",
    SEVERAL_CAPTIONS: "have several captions; only the first is used",
    SEVERAL_ANSWERS: "have several answers; only the first is used",
}


@dataclass(frozen=True)
class Row:
    """A conversation of role and content, not yet checked, the names of its pictures, and all else that the row says.

    A picture that stands in the row is in `inline` by its position: bytes, base64 text, a data URI, or its number in
    the column that its store reads. Without a name of its own it is called `picture N`.
    """

    conversations: Any
    images: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    inline: dict[int, Any] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = ()  # of NOTES
    form: str = field(default="", compare=False)  # how it was written; empty where it has no conversation

    @property
    def shown(self) -> list[str]:
        """The names of the pictures that a model is shown: none where the text has no mark for any, else all.

        A row with pictures and no mark is a text row. Published fine-tuning data has very many of them, each with a
        small black picture that only fills the column.
        """
        return self.images if count_marks(self.conversations) else []


class RowStore(Protocol):
    """Rows by index, pictures by row. Cheap to pickle; forked or spawned, each process opens its files for itself."""

    path: Path  # the file or folder of rows

    @property
    def file_kind(self) -> str:
        """What kind of file that is, as `CSV`."""

    @property
    def split(self) -> str:
        """Which of the splits of `path` these rows are; empty where it has none."""

    @property
    def pictures(self) -> Path | None:
        """The folder or zip of the pictures; None where they stand in the rows, or where there are none."""

    def __len__(self) -> int:
        """How many rows there are, broken ones included."""

    def number(self, index: int) -> int:
        """The number of a row in its file, from 1; in JSONL its line."""

    def location(self, index: int) -> str:
        """`file:row`."""

    def row(self, index: int) -> Row:
        """The row, its pictures not read. Raises RowError."""

    def picture(self, index: int, position: int, name: str) -> bytes:
        """The bytes of picture `position` (from 0) of a row, which calls it `name`. Raises RowError."""

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """A permutation of all rows, int64 [rows], in which they can be read at a good rate."""


class OpenedRows(RowStore, Protocol):
    """A store as it was opened, and what is to be said of that."""

    left_out: str  # what of the files is neither read nor copied; empty for nothing

    @property
    def choice(self) -> Choice:
        """Which of the splits was taken."""


class Reopened:
    """A file that each process opens for itself: a shared handle's position would be everybody's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        self._pid = 0

    def _open(self) -> Any:
        return self.path.open("rb")

    @property
    def handle(self) -> Any:
        if self._pid != os.getpid():
            self._handle, self._pid = self._open(), os.getpid()
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_pid": 0}


def count_marks(conversations: Any) -> int:
    """The pictures that a conversation speaks of; none where it is no conversation."""
    if not isinstance(conversations, list):
        return 0
    texts = [message.get("content") for message in conversations if isinstance(message, dict)]
    return sum(text.count(IMAGE_MARK) for text in texts if isinstance(text, str))


def describe_text_rows(count: int, rows: int) -> str:
    """What is said of text rows that have pictures, `count` of so many rows."""
    return (
        f"{count:,} of {rows:,} rows have an image but no {IMAGE_MARK} in their text: text rows, whose images "
        f"the model does not "
        f"receive (write {IMAGE_MARK} at the image's position in the text)"
    )


def describe_notes(counts: Mapping[str, int], rows: int) -> list[str]:
    """What is said of rows that are read in another way than they are written, `counts` of so many rows."""
    return [f"{counts[name]:,} of {rows:,} rows {text}" for name, text in NOTES.items() if counts.get(name)]


def parse_json(text: str | bytes, before: str = "") -> Any:
    """What JSON says in a row; `before` is what stands in front of the error. Raises RowError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{before}not JSON ({error})", "json") from None


def image_names(names: Any) -> list[str]:
    """Names of pictures: a text that holds them, or a list; absent or empty for none.

    A text may be a JSON list. In any other a comma separates names where the ending of a picture stands before it, or
    where no piece has such an ending: `a, b.jpg` is one name. Spaces at the ends of a single name may belong to it.
    Raises RowError.
    """
    if names is None:
        return []
    if isinstance(names, str):
        return check_names(_read_names(names))
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return check_names(names)
    raise RowError("`image` must be a text with picture names", "image")


def _read_names(text: str) -> list[str]:
    if not text or text.isspace():
        return []
    if text.lstrip()[0] == "[":
        with contextlib.suppress(ValueError, RecursionError):
            names = json.loads(text)
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                return names
    if "," not in text or text.lower().startswith("data:"):
        return [text.strip("\r\n\t\v\f")]
    pieces = text.split(",")
    if any(map(PICTURE_NAME.search, pieces)):
        ends = [n for n, piece in enumerate(pieces, 1) if PICTURE_NAME.search(piece) or n == len(pieces)]
        pieces = [",".join(pieces[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
    if len(pieces) == 1:
        return [text.strip("\r\n\t\v\f")]
    return [piece.strip() for piece in pieces if piece.strip()]


def names_as_text(names: list[str]) -> str | list[str]:
    """Names of pictures as one text with commas, where `image_names` reads it as these names; else the list."""
    text = ", ".join(names)
    return text if image_names(text) == names else names


def check_names(names: list[str]) -> list[str]:
    """The names, if each could be one of a file. Raises RowError."""
    for name in names:
        if NO_NAME.search(name):
            raise RowError(f"{name!r:.80} is not a picture name", "image")
    return names


def check_size(name: str, size: int) -> None:
    """Raises RowError where a picture has more bytes than any has."""
    if size > PICTURE_LIMIT:
        raise RowError(f"{name}: {size} bytes are too many for a picture", "picture too large")
