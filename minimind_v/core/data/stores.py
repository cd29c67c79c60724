"""Where rows and pictures are read from: a JSONL file by offset, pictures from a folder or in place from a zip.

Every store is cheap to pickle and opens its file anew in each process, so data workers may be forked or spawned.
"""

from __future__ import annotations

import codecs
import copy
import json
import mmap
import os
import re
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minimind_v.core.errors import DataError, MissingInput, RowError
from minimind_v.core.hub.sources import how_to_get

PICTURE_LIMIT = 256 * 2**20  # bytes of one picture's file, or that a member of a zip may unpack to
NO_NAME = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters and half characters


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
        if stand_in := _stand_in(path):
            raise DataError(f"{path}: {stand_in}")

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
            row = json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:  # its own text speaks of a line 1
            raise RowError(f"not JSON ({error.msg} at character {error.pos + 1})", "json") from None
        except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5000 digits, nested without end
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
        ends = np.append(offsets[1:], size)
        lines = np.arange(1, len(offsets) + 1)
        # Only a line that begins with white space can be blank, so only those are looked at.
        begins_white = np.frombuffer(view, np.uint8)[offsets] <= ord(" ")
        blank = [i for i in np.flatnonzero(begins_white) if not view[offsets[i] : ends[i]].strip()]
    return np.delete(lines, blank), np.delete(offsets, blank)


def _stand_in(path: Path) -> str | None:
    """What was saved in the place of a data file, where its beginning shows that."""
    with path.open("rb") as file:
        head = file.read(512).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"<"):
        return "this is an HTML page, not data — a link to the page of a file was saved instead of the file"
    if head.startswith(b"version https://git-lfs"):
        return f"this is a git-lfs pointer, not the data — {how_to_get('dataset')}"
    return None


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
        root, path = self.path.resolve(), Path(name.replace("\\", "/"))
        for candidate in (root / path, root / path.name):
            try:
                if candidate.is_file() and candidate.resolve().is_relative_to(root):
                    _check_size(name, candidate.stat().st_size)
                    return candidate.read_bytes()
            except OSError as error:
                raise RowError(f"{name:.80}: cannot be read ({error.strerror})", "picture broken") from None
        raise RowError(f"{name}: no such picture in {self.path}", "picture missing")


class ZipPictures(_Reopened):
    """Pictures in a zip, read in place. Members are only ever looked up by name, never written anywhere."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is no zip."""
        super().__init__(path)
        self._by_name: dict[str, list[str]] = {}
        for member in self.handle.namelist():
            if not member.endswith("/"):
                self._by_name.setdefault(_plain_path(member).rsplit("/", 1)[-1], []).append(member)

    def _open(self) -> zipfile.ZipFile:
        if self._handle is not None:  # inherited by a fork: half a million names need no second reading
            own = copy.copy(self._handle)
            own.fp = self.path.open("rb")
            return own
        try:
            return zipfile.ZipFile(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        except Exception as error:  # zipfile raises many kinds on damaged files
            found = _stand_in(self.path) or f"not a zip that can be read ({error}) — download it again"
            raise DataError(f"{self.path}: {found}") from None

    def read(self, name: str) -> bytes:
        """Found whatever folders the name and the member carry in front, as long as one member fits best."""
        info = self.handle.getinfo(self._find(name))
        if info.flag_bits & 1:
            raise RowError(f"{name}: encrypted in {self.path}", "picture broken")
        _check_size(name, info.file_size)
        try:
            return self.handle.read(info)
        except Exception as error:  # so do its decompressors
            raise RowError(f"{name}: damaged in {self.path} ({error})", "picture broken") from None

    def _find(self, name: str) -> str:
        wanted = _plain_path(name)
        paths = {member: _plain_path(member) for member in self._by_name.get(wanted.rsplit("/", 1)[-1], [])}
        for fits in (
            [member for member, path in paths.items() if path == wanted],
            [member for member, path in paths.items() if path.endswith("/" + wanted)],
            sorted((member for member, path in paths.items() if wanted.endswith("/" + path)), key=len)[-1:],
            list(paths),
        ):
            if len(fits) == 1:
                return fits[0]
            if fits:
                raise RowError(f"{name}: {len(fits)} members of {self.path} have this name", "picture ambiguous")
        raise RowError(f"{name}: no such picture in {self.path}", "picture missing")


def _plain_path(name: str) -> str:
    """A path with forward slashes, without the parts that lead nowhere or upwards."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))


def _check_size(name: str, size: int) -> None:
    if size > PICTURE_LIMIT:
        raise RowError(f"{name}: {size} bytes are too many for a picture", "picture too large")


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
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if NO_NAME.search(name):
            raise RowError(f"{name!r:.80} is no name of a picture", "image")
    return found
