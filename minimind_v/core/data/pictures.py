"""Pictures by name: files below a folder, or members of a zip that is read in place."""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from minimind_v.core.data.index import Index
from minimind_v.core.data.row import Reopened, check_size
from minimind_v.core.data.strangers import stand_in
from minimind_v.core.errors import DataError, MissingInput, RowError
from minimind_v.core.hub.sources import how_to_get

ENTRY = 46  # bytes of an entry of a zip's directory before its name, its extra fields and its comment
LENGTHS = 28  # where it tells how long these three are
KIND = "zip members: hash of the file name, place of the entry"  # of the index
PIECE = 2**20  # bytes of the directory that are looked at together


class Pictures(Protocol):
    """Pictures by name."""

    @property
    def path(self) -> Path | None:
        """The folder or zip; None where there is none."""

    def read(self, name: str) -> bytes:
        """The bytes of a picture. Raises RowError."""


def open_pictures(path: Path | None) -> Pictures:
    """Open a folder or a zip of pictures; None for rows that should have none. Raises MissingInput or DataError."""
    path = find_pictures(path)
    if path is None:
        return NoPictures()
    return FolderPictures(path) if path.is_dir() else ZipPictures(path)


def find_pictures(path: Path | None) -> Path | None:
    """The folder or zip, if it is there. Raises MissingInput."""
    if path is not None and not path.is_dir() and not path.is_file():
        raise MissingInput(f"no pictures at {path} — {how_to_get('dataset')}, or name a folder or a zip with --images")
    return path


class NoPictures:
    """What there is where nobody said where pictures are."""

    path: None = None

    def read(self, name: str) -> bytes:
        raise RowError(f"{name}: the row has a picture, but --images was not given", "picture missing")


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
                    check_size(name, candidate.stat().st_size)
                    return candidate.read_bytes()
            except OSError as error:
                raise RowError(f"{name:.80}: cannot be read ({error.strerror})", "picture broken") from None
        raise RowError(f"{name}: no such picture in {self.path}", "picture missing")


class ZipPictures(Reopened):
    """Pictures in a zip, read in place. Members are only ever looked up by name, never written anywhere.

    Half a million entries of a directory as Python objects are hundreds of megabytes. So only where each entry begins
    is kept, by a hash of the file name in it; what an entry says is read again, by the `zipfile` library, when its
    member is wanted.
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is no zip."""
        super().__init__(path)
        self._prefix = 0  # bytes that stand before the zip in its file, as in an archive that unpacks itself
        try:
            self._index = Index(path, KIND, self._find_entries)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except Exception as error:  # zipfile raises many kinds on damaged files
            found = stand_in(path) or f"not a zip that can be read ({error}) — download it again"
            raise DataError(f"{path}: {found}") from None

    def __len__(self) -> int:
        """How many members it has, folders not counted."""
        return len(self._index)

    def _find_entries(self) -> np.ndarray:
        """Hash of the file name and place of every entry, sorted by hash: uint64 [2, members]."""
        begin, end, count = self._directory()
        hashes, places = [], []
        at = 0
        for piece, starts in self._pieces(begin, end):
            at += len(starts)
            for info, start in zip(_read_directory(piece).filelist, starts, strict=True):
                if not info.filename.endswith("/"):
                    hashes.append(_hash(info.filename))
                    places.append(start)
        if at != count & 0xFFFF and at != count:
            raise zipfile.BadZipFile(f"its directory has {at} entries where it says {count}")
        found = np.array([hashes, places], np.uint64).reshape(2, -1)
        return found[:, np.argsort(found[0], kind="stable")]

    def _directory(self) -> tuple[int, int, int]:
        """Where the directory begins and ends, and how many entries it should have."""
        # The library's own way to find it, in all its forms (zip64, a comment behind, something in front).
        record = zipfile._EndRecData(self.handle)  # type: ignore[attr-defined]
        if not record:
            raise zipfile.BadZipFile("File is not a zip file")
        signature, count, size, offset, end = record[0], record[4], record[5], record[6], record[9]
        if signature == b"PK\x06\x06":
            end -= 56 + 20  # zip64's own record and its locator stand between
        self._prefix = end - size - offset
        if end - size < 0 or self._prefix < 0:
            raise zipfile.BadZipFile("Bad offset for central directory")
        return end - size, end, count

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[bytes, list[int]]]:
        """The directory cut between entries, each piece with the places of its entries in the file."""
        rest = b""
        self.handle.seek(begin)
        while fresh := self.handle.read(min(PIECE, end - begin - len(rest))):
            data, starts, at = rest + fresh, [], 0
            while at + ENTRY <= len(data) and at + (length := _entry_length(data, at)) <= len(data):
                starts.append(begin + at)
                at += length
            yield data[:at], starts
            rest, begin = data[at:], begin + at
        if rest:
            raise zipfile.BadZipFile("Truncated central directory")

    def read(self, name: str) -> bytes:
        """Found whatever folders the name and the member carry in front, as long as one member fits best."""
        archive, info = self._find(name)
        if info.flag_bits & 1:
            raise RowError(f"{name}: encrypted in {self.path}", "picture broken")
        check_size(name, info.file_size)
        try:
            archive.fp = self.handle
            info.header_offset += self._prefix
            if hasattr(info, "_end_offset"):  # newer libraries note where the next member begins, of a whole directory
                info._end_offset = None
            return archive.read(info)
        except Exception as error:  # so do its decompressors
            raise RowError(f"{name}: damaged in {self.path} ({error})", "picture broken") from None

    def _entries(self, name: str) -> dict[str, tuple[zipfile.ZipFile, zipfile.ZipInfo]]:
        """Members whose file name is that of `name`. Of two with the very same path the later one counts."""
        hashes, places = self._index.array
        wanted = np.uint64(_hash(name))
        first, last = (int(np.searchsorted(hashes, wanted, side)) for side in ("left", "right"))
        found = {}
        for place in places[first:last]:
            self.handle.seek(int(place))
            head = self.handle.read(ENTRY)
            archive = _read_directory(head + self.handle.read(_entry_length(head, 0) - ENTRY))
            info = archive.filelist[0]
            found[info.filename] = archive, info
        return found

    def _find(self, name: str) -> tuple[zipfile.ZipFile, zipfile.ZipInfo]:
        wanted = _plain_path(name)
        entries = self._entries(name)
        last = wanted.rsplit("/", 1)[-1]
        paths = {member: path for member in entries if (path := _plain_path(member)).rsplit("/", 1)[-1] == last}
        for fits in (
            [member for member, path in paths.items() if path == wanted],
            [member for member, path in paths.items() if path.endswith("/" + wanted)],
            sorted((member for member, path in paths.items() if wanted.endswith("/" + path)), key=len)[-1:],
            list(paths),
        ):
            if len(fits) == 1:
                return entries[fits[0]]
            if fits:
                raise RowError(f"{name}: {len(fits)} members of {self.path} have this name", "picture ambiguous")
        raise RowError(f"{name}: no such picture in {self.path}", "picture missing")


def _entry_length(data: bytes, at: int) -> int:
    """Bytes of the directory's entry that begins there."""
    return ENTRY + sum(struct.unpack_from("<3H", data, at + LENGTHS))


def _read_directory(entries: bytes) -> zipfile.ZipFile:
    """Let the library read some entries of a directory, as if they were a whole archive's."""
    count = at = 0
    while at < len(entries):
        at += _entry_length(entries, at)
        count += 1
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(entries), 0, 0)
    return zipfile.ZipFile(io.BytesIO(entries + end))


def _hash(name: str) -> int:
    last = _plain_path(name).rsplit("/", 1)[-1]
    return int.from_bytes(hashlib.blake2b(last.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _plain_path(name: str) -> str:
    """A path with forward slashes, without the parts that lead nowhere or upwards."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))
