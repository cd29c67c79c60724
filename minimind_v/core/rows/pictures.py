"""The picture files of rows, by name: in a folder, zip or tar."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import unicodedata
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

from minimind_v.core.errors import MissingInput, RowError, nearest_file
from minimind_v.core.hub.sources import METADATA, how_to_get_data
from minimind_v.core.rows.archives import TarPictures, ZipPictures
from minimind_v.core.rows.names import (
    PicturePath,
    below,
    describe_case,
    describe_namesake,
    folders_of,
    refuse_climbing,
    spellings,
)
from minimind_v.core.rows.row import check_size

FEW_NAMES = 32  # of a folder, to see what it holds
ARCHIVES = (".zip", ".tar")
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL}  # the errors for a name without a file


class Pictures(Protocol):
    """Pictures by name."""

    @property
    def path(self) -> Path | None:
        """The folder or zip; None where there is none."""

    def read(self, name: str) -> bytes:
        """The bytes of a picture. Raises RowError."""


def find_pictures(path: Path | None) -> Path | None:
    """Return the path. Raises MissingInput where it does not exist."""
    if path is not None and not path.is_dir() and not path.is_file():
        if get := how_to_get_data(path):
            raise MissingInput(f"no image files at {path}{get}")
        kind, near = "file" if path.suffix in ARCHIVES else "folder", nearest_file(path, ARCHIVES, folders=True)
        raise MissingInput(f"no {kind} {path}{near} — give a folder, zip or tar with --images")
    return path


def open_pictures(path: Path | None) -> Pictures:
    """Open a folder, zip or tar of pictures; None for none. Raises MissingInput or DataError."""
    if path is None:
        return NoPictures()
    find_pictures(path)
    if path.is_dir() and _is_parquet(path):
        from minimind_v.core.rows.parquet_pictures import ParquetPictures  # here: pyarrow takes its time to import

        return ParquetPictures(path)
    if path.suffix == ".tar" and path.is_file():
        return TarPictures(path)
    return FolderPictures(path) if path.is_dir() else ZipPictures(path)


def _is_parquet(folder: Path) -> bool:
    """Whether a folder holds parquet files and nothing else; of a folder with very many files few names are read."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, FEW_NAMES) if not entry.name.startswith(".")]
    except OSError:
        return False
    return bool(names) and all(name.endswith(".parquet") and name not in METADATA for name in names)


class NoPictures:
    """No pictures, where none were given."""

    path: None = None

    def read(self, name: str) -> bytes:
        raise RowError(
            f"{name}: the row names an image, but --images is missing — give its folder, zip or tar with --images",
            "image missing",
        )


class FolderPictures:
    """Pictures as files below a folder; links are followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # File names are bytes here: the names in rows are UTF-8, whatever the locale.
        self._folder = os.fsencode(path)
        self._roots = folders_of(path)

    def read(self, name: str) -> bytes:
        """Read a picture by its path below the folder; the name may begin with the folder's own path."""
        refuse_climbing(name)
        try:
            for path in spellings(name):
                for names in below(path, self._roots):
                    for file in _files_at(self._folder, names):
                        return _read_file(name, file)
            hint = self._hint(PicturePath.of(name).names)
        except OSError as error:
            raise RowError(f"{name:.80}: cannot be read ({error.strerror})", "image broken") from None
        raise RowError(f"{name}: no such image in {self.path}{hint}", "image missing")

    def _hint(self, names: tuple[str, ...]) -> str:
        """Which existing file a wrong name may mean."""
        if not names:
            return ""
        *folders, last = names
        if folders and any(_files_at(self._folder, (last,))):
            return describe_namesake(names)
        stem, dot, ending = last.rpartition(".")
        endings = [f"{stem}{dot}{other}" for other in (ending.upper(), ending.lower())]
        for other in (*endings, last.upper(), last.lower(), last.capitalize()):
            if any(_files_at(self._folder, (*folders, other))):
                return describe_case(other)
        return ""


def _files_at(folder: bytes, names: tuple[str, ...]) -> Iterator[bytes]:
    """The files at a path below a folder: its exact names first, then as other systems write them."""
    whole = "/".join(names)
    if whole.isascii():
        path = os.path.join(folder, whole.encode())
        if _is(path, stat.S_ISREG):
            yield path
        return
    first, *rest = names
    for spelling in _bytes_of(first):
        path = os.path.join(folder, spelling)
        if not rest and _is(path, stat.S_ISREG):
            yield path
        if rest and _is(path, stat.S_ISDIR):
            yield from _files_at(path, tuple(rest))


def _bytes_of(name: str) -> Iterator[bytes]:
    """How a file system may store a name: composed or decomposed UTF-8, or GBK of an old Chinese Windows."""
    forms = dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))])
    for encoding in ("utf-8",) if name.isascii() else ("utf-8", "gbk"):
        for form in forms:
            with contextlib.suppress(UnicodeEncodeError):
                yield form.encode(encoding, "surrogateescape")


def _is(path: bytes, kind: Callable[[int], bool]) -> bool:
    """Whether a path, links resolved, is of a kind. Raises OSError where it exists but is not accessible."""
    try:
        return kind(os.stat(path).st_mode)
    except ValueError:  # a zero byte
        return False
    except OSError as error:
        if error.errno in NOT_THERE:
            return False
        raise


def _read_file(name: str, path: bytes) -> bytes:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        check_size(name, size)
        return file.read(size)
