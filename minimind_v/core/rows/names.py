"""Image names in rows, and how a name may differ from the file name.

An exact match always counts first. No spelling leads to another folder: a name may only lose leading folders that
belong to the path of the pictures themselves.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from minimind_v.core.errors import RowError

FILE_ADDRESS = re.compile(r"file:/*(?:localhost(?=/))?", re.IGNORECASE)
DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class PicturePath:
    """A path of folders and a file name; `absolute` where it begins at the root of a file system."""

    names: tuple[str, ...]
    absolute: bool = False

    @classmethod
    def of(cls, text: str) -> PicturePath:
        """Read a path with either slash, without empty names, `.` and the letter of a drive."""
        plain = text.replace("\\", "/")
        names = [name for name in plain.split("/") if name not in ("", ".")]
        drive = bool(names) and DRIVE.fullmatch(names[0]) is not None
        return cls(tuple(names[drive:]), drive or plain.startswith("/"))

    def composed(self) -> PicturePath:
        """The same path in Unicode's composed form (NFC)."""
        return PicturePath(tuple(unicodedata.normalize("NFC", name) for name in self.names), self.absolute)


def spellings(name: str) -> Iterator[PicturePath]:
    """The paths that a name may mean, the exact text first; none leads upwards."""
    if "\\" in name:  # an ordinary letter on most systems
        yield PicturePath(tuple(folder for folder in name.split("/") if folder not in ("", ".")))
    for text in _texts(name):
        path = PicturePath.of(text)
        if path.names and ".." not in path.names:
            yield path


def _texts(name: str) -> Iterator[str]:
    """A name as given, without surrounding spaces, from a file: address, and percent-decoded or -encoded."""
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
    """The paths that a path may mean below a folder whose own path, composed, is one of `roots`; the likeliest first.

    Leading folders are dropped where all of them are the end of the folder's own path. An absolute path may be of
    another machine: one of its folders must be left, or be the last of the folder's path, unless the path leads to
    this folder.
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


def folders_of(path: Path) -> list[tuple[str, ...]]:
    """The names of a folder and the folders above it, as given and with links resolved."""
    texts = [os.fsencode(form).decode("utf-8", "surrogateescape") for form in (path.absolute(), path.resolve())]
    return [PicturePath.of(text).composed().names for text in texts]


def refuse_climbing(name: str) -> None:
    """Raises RowError where a name leads out of its folder."""
    if ".." in name and ".." in PicturePath.of(name).names:
        raise RowError(f"{name}: `..` in an image name — write the path below --images", "image missing")


def describe_namesake(names: tuple[str, ...]) -> str:
    folders, last = "/".join(names[:-1]), names[-1]
    return f" (a {last} exists, but not in {folders}) — give the folder that contains {names[0]}/ with --images"


def describe_case(last: str) -> str:
    return f" ({last} exists) — write the name exactly like the file name"
