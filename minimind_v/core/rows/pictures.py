"""Find picture files by name: in a folder, or in an archive that is read in place."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import unicodedata
import zipfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from minimind_v.core.errors import DataError, MissingInput, RowError
from minimind_v.core.hub.sources import how_to_get
from minimind_v.core.rows.index import Index
from minimind_v.core.rows.members import (
    DEFLATED,
    ENCRYPTED,
    METHODS,
    STORED,
    Member,
    directory,
    entries,
    entry_at,
    hash_name,
    hashes,
    unpack,
)
from minimind_v.core.rows.names import PicturePath, below, spellings
from minimind_v.core.rows.row import Reopened, check_size
from minimind_v.core.rows.strangers import stand_in

KIND = "zip members: hash of a reading of the folded file name, place of the entry"  # of the index
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
        raise MissingInput(
            f"no picture files at {path} — {how_to_get('dataset')}, or give a folder, zip or tar with --images"
        )
    return path


class NoPictures:
    """No pictures, where none were given."""

    path: None = None

    def read(self, name: str) -> bytes:
        raise RowError(
            f"{name}: the row names a picture, but --images is missing — give its folder, zip or tar with --images",
            "picture missing",
        )


class FolderPictures:
    """Pictures as files below a folder; links are followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # File names are bytes here: the names in rows are UTF-8, whatever the locale.
        self._folder = os.fsencode(path)
        self._roots = _folders_of(path)

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
            raise RowError(f"{name:.80}: cannot be read ({error.strerror})", "picture broken") from None
        raise RowError(f"{name}: no such picture in {self.path}{hint}", "picture missing")

    def _hint(self, names: tuple[str, ...]) -> str:
        """Which existing file a wrong name may mean."""
        if not names:
            return ""
        *folders, last = names
        if folders and any(_files_at(self._folder, (last,))):
            return _describe_namesake(names)
        stem, dot, ending = last.rpartition(".")
        endings = [f"{stem}{dot}{other}" for other in (ending.upper(), ending.lower())]
        for other in (*endings, last.upper(), last.lower(), last.capitalize()):
            if any(_files_at(self._folder, (*folders, other))):
                return _describe_case(other)
        return ""


def _folders_of(path: Path) -> list[tuple[str, ...]]:
    """The names of a folder and the folders above it, as given and with links resolved."""
    texts = [os.fsencode(form).decode("utf-8", "surrogateescape") for form in (path.absolute(), path.resolve())]
    return [PicturePath.of(text).composed().names for text in texts]


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


class Named(Protocol):
    """A member of an archive."""

    @property
    def names(self) -> list[str]:
        """The readings of its name, the likeliest first."""


M = TypeVar("M", bound=Named)


class ArchivePictures(Reopened, Generic[M]):
    """Pictures in an archive, read in place and never extracted.

    Half a million entries as Python objects would take hundreds of megabytes. So the index keeps only a hash of
    each file name and the offset of its entry; each read of a picture reads the entry again.
    """

    damage: tuple[type[Exception], ...]  # errors of a damaged archive

    def __init__(self, path: Path, kind: str, subject: str = "") -> None:
        super().__init__(path)
        self._index = Index(path, kind, self._find_entries, subject)
        self._roots = _roots_of(path)

    def _hashed_names(self) -> Iterator[tuple[int, int]]:
        """A hash of each reading of each member's file name, and the offset of its entry."""
        raise NotImplementedError

    def _namesakes(self, last: str) -> dict[str, M]:
        """Members with this file name in any spelling, by their likeliest path; the later of two with one path."""
        raise NotImplementedError

    def _find_entries(self) -> np.ndarray:
        """A hash and an offset for every reading of a name, sorted by hash: uint64 [2, readings]."""
        digests, offsets = array("Q"), array("Q")
        for digest, offset in self._hashed_names():
            digests.append(digest)
            offsets.append(offset)
        both = np.array([digests, offsets], np.uint64).reshape(2, -1)
        return both[:, np.argsort(both[0], kind="stable")]

    def _offsets(self, last: str) -> list[int]:
        """The offsets of the entries that may have this file name."""
        digests, offsets = self._index.array
        digest = np.uint64(hash_name(last))
        first, end = (int(np.searchsorted(digests, digest, side)) for side in ("left", "right"))
        return [int(offset) for offset in offsets[first:end]]

    def _find(self, name: str) -> M | None:
        for path in spellings(name):
            members = self._namesakes(path.names[-1])
            for matches in _matching(path, list(members.values()), self._roots):
                if len(matches) == 1:
                    return matches[0]
                if matches:
                    raise RowError(f"{name}: {len(matches)} members of {self.path} have this name", "picture ambiguous")
        return None

    def _member(self, name: str) -> M:
        """The member at a path in the archive, below any folders, if exactly one matches best. Raises RowError."""
        refuse_climbing(name)
        try:
            if (member := self._find(name)) is not None:
                return member
            hint = self._hint(name)
        except self.damage as error:
            raise RowError(f"{name}: {self.path} has changed or is damaged ({error})", "picture broken") from None
        raise RowError(f"{name}: no such picture in {self.path}{hint}", "picture missing")

    def _hint(self, name: str) -> str:
        """Which existing member a wrong name may mean."""
        names = PicturePath.of(name).names
        others = [PicturePath.of(other).names for other in self._namesakes(names[-1])] if names else []
        lasts = [other[-1] for other in others if other]
        if len(names) > 1 and names[-1] in lasts:
            return _describe_namesake(names)
        return _describe_case(lasts[0]) if lasts else ""


class ZipPictures(ArchivePictures[Member]):
    """Pictures in a zip."""

    damage = (OSError, ValueError, zipfile.BadZipFile)

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is not a zip."""
        try:
            super().__init__(path, KIND)
            self._prefix = directory(self.handle)[3]
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except Exception as error:  # zipfile raises many kinds on damaged files
            trouble = stand_in(path) or f"not a zip that can be read ({error}) — download it again"
            raise DataError(f"{path}: {trouble}") from None

    def __len__(self) -> int:
        """The number of members without folders."""
        return len(np.unique(self._index.array[1]))

    def _hashed_names(self) -> Iterator[tuple[int, int]]:
        begin, end, count, _ = directory(self.handle)
        number = 0
        for offset, member in entries(self.handle, begin, end):
            number += 1
            for digest in hashes(member):
                yield digest, offset
        if number != count & 0xFFFF and number != count:
            raise zipfile.BadZipFile(f"its directory has {number} entries where it says {count}")

    def read(self, name: str) -> bytes:
        member = self._member(name)
        if member.flags & ENCRYPTED:
            raise RowError(f"{name}: encrypted in {self.path}", "picture broken")
        if member.method not in (STORED, DEFLATED):
            method = METHODS.get(member.method, f"method {member.method}")
            raise RowError(
                f"{name}: compressed with {method} in {self.path}; zip members must be stored or deflated — "
                "create the zip again",
                "picture broken",
            )
        check_size(name, max(member.size, member.packed))
        try:
            return unpack(self.handle, member, self._prefix)
        except self.damage as error:  # ValueError: no file is so long
            raise RowError(f"{name}: damaged in {self.path} ({error})", "picture broken") from None

    def _namesakes(self, last: str) -> dict[str, Member]:
        return {member.names[0]: member for member in (entry_at(self.handle, offset) for offset in self._offsets(last))}


def _roots_of(archive: Path) -> list[tuple[str, ...]]:
    """The paths of the folders that may have been packed into an archive."""
    stems = dict.fromkeys([archive.stem, archive.stem.removesuffix("_images")])
    return [(*folder, stem) for folder in _folders_of(archive.parent) for stem in stems]


def _matching(path: PicturePath, members: list[M], roots: list[tuple[str, ...]]) -> Iterator[list[M]]:
    """Members that a path may mean, the best first: exact, below more folders, with fewer of its own folders."""
    readings = [[PicturePath.of(name).names for name in member.names] for member in members]
    yield [member for member, paths in zip(members, readings, strict=True) if path.names in paths]
    composed = [[tuple(unicodedata.normalize("NFC", n) for n in names) for names in paths] for paths in readings]
    candidates = below(path.composed(), roots)
    ends = [[names[-len(candidates[0]) :] for names in paths] for paths in composed]
    for names, paths_of_members in [
        (candidates[0], composed),
        (candidates[0], ends),
        *((names, composed) for names in candidates[1:]),
    ]:
        yield [member for member, paths in zip(members, paths_of_members, strict=True) if names in paths]


def refuse_climbing(name: str) -> None:
    """Raises RowError where a name leads out of its folder."""
    if ".." in name and ".." in PicturePath.of(name).names:
        raise RowError(f"{name}: `..` in a picture name — write the path below --images", "picture missing")


def _describe_namesake(names: tuple[str, ...]) -> str:
    folders, last = "/".join(names[:-1]), names[-1]
    return f" (a {last} exists, but not in {folders}) — give the folder that contains {names[0]}/ with --images"


def _describe_case(last: str) -> str:
    return f" ({last} exists) — write the name exactly like the file name"
