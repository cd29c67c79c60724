"""Image names in rows, and how a name may differ from the file name.

A name that is there exactly always counts first. No spelling leads from one folder to another: a name may only lose
folders in front that are those of the pictures themselves.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

FILE_ADDRESS = re.compile(r"file:/*(?:localhost(?=/))?", re.IGNORECASE)
DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class PicturePath:
    """A path of folders and a file name; `absolute` where it began at the root of a file system."""

    names: tuple[str, ...]
    absolute: bool = False

    @classmethod
    def of(cls, text: str) -> PicturePath:
        """Read a path with either slash. Empty names, `.` and the letter of a drive are left out."""
        plain = text.replace("\\", "/")
        names = [name for name in plain.split("/") if name not in ("", ".")]
        drive = bool(names) and DRIVE.fullmatch(names[0]) is not None
        return cls(tuple(names[drive:]), drive or plain.startswith("/"))

    def composed(self) -> PicturePath:
        """The same path in Unicode's composed form (NFC)."""
        return PicturePath(tuple(unicodedata.normalize("NFC", name) for name in self.names), self.absolute)


def spellings(name: str) -> Iterator[PicturePath]:
    """What a name may mean, the exact text first; none of it leads upwards."""
    if "\\" in name:  # in most systems a letter like others
        yield PicturePath(tuple(folder for folder in name.split("/") if folder not in ("", ".")))
    for text in _texts(name):
        path = PicturePath.of(text)
        if path.names and ".." not in path.names:
            yield path


def _texts(name: str) -> Iterator[str]:
    """A name as it stands; without spaces around it; as a file: address; with percent-encoding taken off or put on."""
    yield name
    text = name.strip()
    if text != name:
        yield text
    if address := FILE_ADDRESS.match(text):
        text = "/" + text[address.end() :].lstrip("/")
        yield text
    if "%" in text:
        yield unquote(text)
    encoded = quote(text, safe="/\\:", errors="surrogatepass")
    if encoded != text:
        yield encoded


def below(path: PicturePath, roots: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Where a path may lie below a folder whose own path, composed, is one of `roots`; the likeliest place first.

    Leading folders are dropped where they are the folder's own: all of them must be the end of its path. An absolute
    path was perhaps written on another machine: of it one folder must be left, or be the last of the folder's path,
    unless it leads to this very folder.
    """
    names, plain = path.names, path.composed().names
    if path.absolute and (root_of_path := next((root for root in roots if plain[: len(root)] == root), None)):
        return [names[len(root_of_path) :]]
    paths = {names: None}
    for count in range(1, len(names)):
        dropped, left = plain[:count], names[count:]
        own = any(root[-count:] == dropped for root in roots)
        likely = path.absolute and (len(left) > 1 or any(root[-1:] == dropped[-1:] for root in roots))
        if own or likely:
            paths[left] = None
    return list(paths)
