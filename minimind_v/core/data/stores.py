"""Where rows and pictures are read from: a JSONL file by offset, pictures from a folder or in place from a zip.

Every store is cheap to pickle and opens its file anew in each process, so data workers may be forked or spawned.
"""

from __future__ import annotations

import json
import mmap
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minimind_v.core.errors import DataError, MissingInput, RowError
from minimind_v.core.hub.sources import how_to_get

MEMBER_LIMIT = 256 * 2**20  # bytes that one member of a zip may unpack to


class _Reopened:
    """A file that each process opens for itself: a shared handle's position would be everybody's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        self._pid = 0

    def _open(self) -> Any:
        raise NotImplementedError

    @property
    def handle(self) -> Any:
        if self._pid != os.getpid():
            self._handle, self._pid = self._open(), os.getpid()
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_pid": 0}


class JsonlRows(_Reopened):
    """Rows of a JSONL file. Only the lines' offsets are kept in memory: 8 bytes a row."""

    def __init__(self, path: Path) -> None:
        """Raises MissingInput, or DataError where the file is no JSONL or is empty."""
        super().__init__(path)
        if not path.is_file():
            raise MissingInput(f"no data file {path} — {how_to_get('dataset')}, or name yours with --data")
        self.lines, self.offsets = _index_lines(path)
        if len(self.offsets) == 0:
            raise DataError(f"{path}: the file has no rows")
        with path.open("rb") as file:
            head = file.read(512).lstrip().lower()
        if head.startswith((b"<!doctype", b"<html")):
            raise DataError(
                f"{path}: this is an HTML page, not data — a link to the page of a file was saved instead of the file"
            )
        if head.startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: this is a git-lfs pointer, not the data — {how_to_get('dataset')}")

    def _open(self) -> Any:
        return self.path.open("rb")

    def __len__(self) -> int:
        return len(self.offsets)

    def place(self, index: int) -> str:
        """`file:row` as an editor counts."""
        return f"{self.path}:{self.lines[index]}"

    def row(self, index: int) -> dict[str, Any]:
        """The row as a dict. Raises RowError."""
        self.handle.seek(self.offsets[index])
        line = self.handle.readline()
        try:
            row = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise RowError(f"not JSON ({error})", "json") from None
        if not isinstance(row, dict):
            raise RowError("not a JSON object", "json")
        return row


def _index_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Line numbers (from 1) and byte offsets of all lines that are not blank."""
    size = path.stat().st_size
    if size == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    starts = [np.zeros(1, np.int64)]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        step = 16 * 2**20
        for begin in range(0, size, step):
            chunk = np.frombuffer(view[begin : begin + step], np.uint8)
            starts.append(np.flatnonzero(chunk == 10) + begin + 1)
        offsets = np.concatenate(starts)
        offsets = offsets[offsets < size]
        lengths = np.diff(np.append(offsets, size))
        lines = np.arange(1, len(offsets) + 1)
        # Only a short line can be blank, so only those are looked at.
        blank = [i for i in np.flatnonzero(lengths < 8) if not view[offsets[i] : offsets[i] + lengths[i]].strip()]
    return np.delete(lines, blank), np.delete(offsets, blank)


class Pictures(Protocol):
    """Pictures by name."""

    def read(self, name: str) -> bytes:
        """The bytes of a picture. Raises RowError."""


class FolderPictures:
    """Pictures as files below a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> bytes:
        """Found at its path below the folder or, whatever folders the name carries, directly in it."""
        root = self.path.resolve()
        for candidate in (root / name, root / Path(name).name):
            if candidate.is_file() and candidate.resolve().is_relative_to(root):
                try:
                    return candidate.read_bytes()
                except OSError as error:
                    raise RowError(f"{name}: cannot be read ({error.strerror})", "picture broken") from None
        raise RowError(f"{name}: no such picture in {self.path}", "picture missing")


class ZipPictures(_Reopened):
    """Pictures in a zip, read in place. Members are only ever looked up by name, never written anywhere."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is no zip."""
        super().__init__(path)
        self._by_name: dict[str, list[str]] = {}
        for member in self.handle.namelist():
            if not member.endswith("/"):
                self._by_name.setdefault(member.rsplit("/", 1)[-1], []).append(member)

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{self.path}: not a zip that can be read ({error}) — download it again") from None

    def read(self, name: str) -> bytes:
        """Found whatever folders the name and the member carry in front, as long as one member fits best."""
        member = self._find(name.replace("\\", "/").lstrip("./"))
        info = self.handle.getinfo(member)
        if info.flag_bits & 1:
            raise RowError(f"{name}: encrypted in {self.path}", "picture broken")
        if info.file_size > MEMBER_LIMIT:
            raise RowError(f"{name}: unpacks to {info.file_size} bytes, too many for a picture", "picture too large")
        try:
            return self.handle.read(info)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
            raise RowError(f"{name}: damaged in {self.path} ({error})", "picture broken") from None

    def _find(self, name: str) -> str:
        members = self._by_name.get(name.rsplit("/", 1)[-1], [])
        for fits in (
            [member for member in members if member == name],
            [member for member in members if member.endswith("/" + name)],
            [member for member in members if name.endswith("/" + member)],
            members,
        ):
            if len(set(fits)) == 1:
                return fits[0]
            if fits:
                raise RowError(f"{name}: {len(fits)} members of {self.path} have this name", "picture ambiguous")
        raise RowError(f"{name}: no such picture in {self.path}", "picture missing")


def open_pictures(path: Path | None) -> Pictures | None:
    """Open a folder or a zip of pictures; None for rows without any. Raises MissingInput or DataError."""
    if path is None:
        return None
    if path.is_dir():
        return FolderPictures(path)
    if path.is_file():
        return ZipPictures(path)
    raise MissingInput(f"no pictures at {path} — {how_to_get('dataset')}, or name a folder or a zip with --images")


def image_names(row: dict[str, Any]) -> list[str]:
    """The picture names of a row: `image` holds them separated by commas, and may be absent or empty."""
    names = row.get("image")
    if names is None:
        return []
    if not isinstance(names, str):
        raise RowError("`image` is not a text of picture names", "image")
    return [name.strip() for name in names.split(",") if name.strip()]
