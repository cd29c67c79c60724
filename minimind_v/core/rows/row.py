"""One row of training data, independent of its file format, and the interface of row stores."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minimind_v.core.errors import RowError
from minimind_v.core.rows.splits import Choice

PICTURE_LIMIT = 256 * 2**20  # bytes of one picture file, unpacked
NO_NAME = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters and half characters
PICTURE_NAME = re.compile(r"\.(a?png|avif|bmp|gif|hei[cf]|jfif|jp2|jpe?g?|mpo|p[bgpn]m|tga|tiff?|webp)\s*$", re.I)
PICTURE_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
IMAGE_MARK = "<image>"  # in a message: the position of a picture
NUMBERED = re.compile(r"image \d+")  # the name of an image without one

# Notes on rows that are not read exactly as written: not errors, but reported.
ANSWER_FIRST = "began with an answer"
MARK_PER_TURN = "one image, a mark in every turn"
MARK_IN_ANSWER = "a mark in an answer"
SEVERAL_CAPTIONS = "several captions, the first is read"
SEVERAL_ANSWERS = "several answers, the first is read"
NOTES = {  # and how such rows are read
    ANSWER_FIRST: "begin with an answer without a question; it is not used",
    MARK_PER_TURN: f"have one image and {IMAGE_MARK} in every question; only the first {IMAGE_MARK} counts",
    MARK_IN_ANSWER: f"have {IMAGE_MARK} in an answer; only what follows it depends on the image",
    SEVERAL_CAPTIONS: "have several captions; only the first is used",
    SEVERAL_ANSWERS: "have several answers; only the first is used",
}


@dataclass(frozen=True)
class Row:
    """A conversation of role and content, not yet checked, the names of its pictures, and all other fields.

    `inline` holds pictures in the row by position: bytes, base64 text, a data URI, or the number in the column that
    the store reads. A picture without a name is called `picture N`.
    """

    conversations: Any
    images: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    inline: dict[int, Any] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = ()  # of NOTES
    form: str = field(default="", compare=False)  # the form of the conversation; empty without one

    @property
    def shown(self) -> list[str]:
        """The names of the pictures that a model receives: all if the text has a mark, else none.

        A row with pictures and no mark is a text row. Published fine-tuning data has very many, each with a small
        black picture that only fills the column.
        """
        return self.images if count_marks(self.conversations) else []


class RowStore(Protocol):
    """Rows by index, pictures by row. Cheap to pickle; each process opens its own files."""

    path: Path  # the file or folder of rows

    @property
    def file_kind(self) -> str:
        """The kind of that file, such as `CSV`."""

    @property
    def split(self) -> str:
        """The split of these rows; empty where `path` has none."""

    @property
    def pictures(self) -> Path | None:
        """The folder or zip of the pictures; None where they are in the rows, or without any."""

    def __len__(self) -> int:
        """The number of rows, with the broken ones."""

    def number(self, index: int) -> int:
        """The number of a row in its file, from 1; in JSONL its line."""

    def location(self, index: int) -> str:
        """`file:row`."""

    def row(self, index: int) -> Row:
        """The row, without reading its pictures. Raises RowError."""

    def picture(self, index: int, position: int, name: str) -> bytes:
        """The bytes of picture `position` (from 0) of a row, with this name. Raises RowError."""

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """A permutation of all rows, int64 [rows], that is fast to read."""


class OpenedRows(RowStore, Protocol):
    """A store with the messages about its opening."""

    left_out: str  # a message about ignored columns; empty for none
    read: Callable[[Mapping[str, Any]], Row]  # how the fields of a row are read

    @property
    def choice(self) -> Choice:
        """The selected split."""


class Reopened:
    """A file that each process opens for itself, since a shared handle has one position for all."""

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
    """The number of image marks in a conversation; 0 for any other value."""
    if not isinstance(conversations, list):
        return 0
    texts = [message.get("content") for message in conversations if isinstance(message, dict)]
    return sum(text.count(IMAGE_MARK) for text in texts if isinstance(text, str))


def describe_text_rows(count: int, rows: int) -> str:
    """The message about `count` of `rows` rows that are text rows with pictures."""
    return (
        f"{count:,} of {rows:,} rows have an image but no {IMAGE_MARK} in their text: text rows, whose images "
        f"the model does not receive (write {IMAGE_MARK} at the image's position in the text)"
    )


def describe_notes(counts: Mapping[str, int], rows: int) -> list[str]:
    """The messages about rows that are not read exactly as written: `counts` by note, of so many rows."""
    return [f"{counts[name]:,} of {rows:,} rows {text}" for name, text in NOTES.items() if counts.get(name)]


def parse_json(text: str | bytes, before: str = "") -> Any:
    """Parse JSON in a row; `before` begins the error message. Raises RowError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{before}not JSON ({error})", "json") from None


def image_names(names: Any) -> list[str]:
    """Names of pictures from a text or a list; none from None or an empty text.

    A text may be a JSON list. In any other text a comma separates names behind the ending of a picture file, or where
    no piece has such an ending: `a, b.jpg` is one name. A single name keeps its outer spaces. Raises RowError.
    """
    if names is None:
        return []
    if isinstance(names, str):
        return check_names(_read_names(names))
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return check_names(names)
    raise RowError("`image` must be a text with image names", "image")


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
    """Names of pictures as one text with commas, if `image_names` reads the same names from it; else the list."""
    text = ", ".join(names)
    return text if image_names(text) == names else names


def check_names(names: list[str]) -> list[str]:
    """Return the names. Raises RowError where one cannot be a file name."""
    for name in names:
        if NO_NAME.search(name):
            raise RowError(f"{name!r:.80} is not an image name", "image")
    return names


def check_size(name: str, size: int) -> None:
    """Raises RowError where a picture has too many bytes."""
    if size > PICTURE_LIMIT:
        raise RowError(f"{name}: {size} bytes are too many for an image", "image too large")
