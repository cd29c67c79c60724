"""The errors that a user can cause, as one tree.

MmvError                  one line: what is wrong, where, and what to do next   (exit code 1)
├── UsageError            a wrong option, key or value                          (exit code 2)
├── MissingInput          a file is missing that an earlier command makes
├── DataError             a row, an image or a data file is broken
│   └── RowError          one broken row: it is skipped and counted
├── WeightsError          a weights file is damaged, foreign or of another size
└── RunError              a run cannot continue (no finite loss, no room to save)
    └── LostContact       another process of the run has ended; its own error says why

The command line prints each as one red line, and below it an indented line for each of several items; any other
exception that reaches the user is a defect of mmv.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

NAME, MESSAGE = 300, 4000  # characters of a name, and of a whole message, beyond which their middle is left out
ITEMS = 20  # lines of a list


class MmvError(Exception):
    """Base of all errors that a user can cause; its text is the whole message, on one readable line.

    `items` are what a message ends with a list of; a terminal shows each on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str = "", items: Sequence[str] = ()) -> None:
        super().__init__(readable(f"{message}: {'; '.join(items)}" if items else message))
        self.lines = [str(self)]
        if items:
            more = [f"and {len(items) - ITEMS:,} more"] if len(items) > ITEMS else []
            self.lines = [f"{readable(message)}:", *map(readable, items[:ITEMS]), *more]


class UsageError(MmvError):
    """A wrong option, configuration key or value."""

    exit_code = 2


class MissingInput(MmvError):
    """One or several inputs are missing; each message names the command that makes the input."""

    def __init__(self, *missing: str) -> None:
        if len(missing) > 1:
            super().__init__(f"{len(missing)} inputs are missing", missing)
        else:
            super().__init__(*missing)
        self.missing = missing

    def __reduce__(self) -> tuple[type[MissingInput], tuple[str, ...]]:
        return type(self), self.missing


class DataError(MmvError):
    """A data file, or too many of its rows, cannot be used."""


class RowError(DataError):
    """One row cannot be used. `kind` is a short word that reports group by."""

    def __init__(self, message: str, kind: str = "row") -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        """Keep `kind` when a data worker sends the error."""
        return type(self), (self.args[0], self.kind)


class WeightsError(MmvError):
    """A weights file is damaged, foreign or of another size."""


class RunError(MmvError):
    """A run cannot continue."""


class LostContact(RunError):
    """Another process of the run has ended; its own error says why."""


def shorten(text: str, longest: int = NAME) -> str:
    """Return a text of at most `longest` characters: its beginning, its end, and how long it was."""
    if len(text) <= longest:
        return text
    note = f" ({len(text):,} characters)"
    kept = max(longest - len(note) - 1, 8)
    return f"{text[: kept * 3 // 4]}…{text[-(kept // 4) :]}{note}"


def readable(message: str) -> str:
    """Return a message on one line; very long words (an image in base64) and very long messages are cut."""
    message = re.sub(r"\s*[\r\n\v\f\x85\u2028\u2029]\s*", " ", message.strip("\r\n"))
    message = re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]", lambda control: f"\\x{ord(control[0]):02x}", message)
    long_word = rf"\S{{{NAME},}}[^\s:;,.)\]'\"]"  # without the marks behind it
    return shorten(re.sub(long_word, lambda word: shorten(word[0]), message), MESSAGE)


def open_all(*openers: Callable[[], Any]) -> list[Any]:
    """Call all openers and return their results. Raises one MissingInput that names all that is missing."""
    opened: list[Any] = []
    missing: dict[str, None] = {}
    for opener in openers:
        try:
            opened.append(opener())
        except MissingInput as error:
            missing |= dict.fromkeys(error.missing)
    if missing:
        raise MissingInput(*missing)
    return opened


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` with the choice most similar to `word`, or an empty string."""
    choice = _most_similar(word, choices)
    return f" (did you mean {choice!r}?)" if choice is not None else ""


def nearest_file(path: Path, endings: tuple[str, ...], folders: bool = False) -> str:
    """` (did you mean 'x'?)` with the most similar path beside `path`, or an empty string.

    It has one of these endings, which are not compared, or is one of the folders where those count.
    """
    try:
        beside = [
            other for other in path.parent.iterdir() if other.name.endswith(endings) or (folders and other.is_dir())
        ]
    except OSError:  # no folder either
        return ""
    # Of several with one name a file is meant, and that with the first ending.
    beside.sort(key=lambda other: (other.name.endswith(endings), other.name.endswith(endings[:1])))
    names = {other.name.partition(".")[0]: other for other in beside}
    name = _most_similar(path.name.partition(".")[0], names)
    return f" (did you mean {str(names[name])!r}?)" if name is not None else ""


def _most_similar(word: str, choices: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)), None)


def unusable(text: str) -> str:
    """Return why a text cannot be a file name on this system, or an empty string where it can."""
    if "\0" in text:
        return "contains a NUL character, which no file name can have"
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return "contains half of a character (a lone surrogate)"
    return ""
