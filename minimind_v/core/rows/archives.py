"""Picture files in a zip or tar, found by name; the archive is read in place."""

from __future__ import annotations

import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows.index import Index, columns
from minimind_v.core.rows.members import (
    DEFLATED,
    ENCRYPTED,
    METHODS,
    STORED,
    directory,
    entries,
    entry_at,
    hash_name,
    hashes,
    unpack,
)
from minimind_v.core.rows.members import Member as ZipMember
from minimind_v.core.rows.names import (
    PicturePath,
    below,
    describe_case,
    describe_namesake,
    folders_of,
    refuse_climbing,
    spellings,
)
from minimind_v.core.rows.row import Reopened, check_size
from minimind_v.core.rows.strangers import stand_in
from minimind_v.core.rows.tar_members import DamagedTar, read_exactly, read_members
from minimind_v.core.rows.tar_members import Member as TarMember

ZIP_KIND = "zip members: hash of a reading of the folded file name, place of the entry"  # of the index
TAR_KIND = "tar members: hash of a reading of the folded file name, place of the header"
M = TypeVar("M", bound=ZipMember | TarMember)


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
        both = columns(self._hashed_names())
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
                    raise RowError(f"{name}: {len(matches)} members of {self.path} have this name", "image ambiguous")
        return None

    def _member(self, name: str) -> M:
        """The member at a path in the archive, below any folders, if exactly one matches best. Raises RowError."""
        refuse_climbing(name)
        try:
            if (member := self._find(name)) is not None:
                return member
            hint = self._hint(name)
        except self.damage as error:
            raise RowError(f"{name}: {self.path} has changed or is damaged ({error})", "image broken") from None
        raise RowError(f"{name}: no such image in {self.path}{hint}", "image missing")

    def _hint(self, name: str) -> str:
        """Which existing member a wrong name may mean."""
        names = PicturePath.of(name).names
        others = [PicturePath.of(other).names for other in self._namesakes(names[-1])] if names else []
        lasts = [other[-1] for other in others if other]
        if len(names) > 1 and names[-1] in lasts:
            return describe_namesake(names)
        return describe_case(lasts[0]) if lasts else ""


class ZipPictures(ArchivePictures[ZipMember]):
    """Pictures in a zip."""

    damage = (OSError, ValueError, zipfile.BadZipFile)

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is not a zip."""
        try:
            super().__init__(path, ZIP_KIND)
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
            raise RowError(f"{name}: encrypted in {self.path}", "image broken")
        if member.method not in (STORED, DEFLATED):
            method = METHODS.get(member.method, f"method {member.method}")
            raise RowError(
                f"{name}: compressed with {method} in {self.path}; zip members must be stored or deflated — "
                "create the zip again",
                "image broken",
            )
        check_size(name, max(member.size, member.packed))
        try:
            return unpack(self.handle, member, self._prefix)
        except self.damage as error:  # ValueError: no file is so long
            raise RowError(f"{name}: damaged in {self.path} ({error})", "image broken") from None

    def _namesakes(self, last: str) -> dict[str, ZipMember]:
        return {member.names[0]: member for member in (entry_at(self.handle, offset) for offset in self._offsets(last))}


class TarPictures(ArchivePictures[TarMember]):
    """Pictures in a tar, found by the same names as in a zip."""

    damage = (DamagedTar, OSError, StopIteration)

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is damaged or not a tar; a cut off tar keeps its whole members."""
        if trouble := stand_in(path):
            raise DataError(f"{path}: {trouble}")
        super().__init__(path, TAR_KIND, "pictures")

    def _hashed_names(self) -> Iterator[tuple[int, int]]:
        try:
            for member in read_members(self.handle):
                for name in member.names:
                    yield hash_name("".join(PicturePath.of(name).names[-1:])), member.start
        except DamagedTar as error:
            if not error.cut:
                raise DataError(f"{self.path}: damaged ({error}) — download it again") from None

    def _namesakes(self, last: str) -> dict[str, TarMember]:
        members = [next(read_members(self.handle, offset)) for offset in self._offsets(last)]
        return {"/".join(PicturePath.of(member.name).names): member for member in members}

    def read(self, name: str) -> bytes:
        member = self._member(name)
        if member.trouble:
            raise RowError(f"{name}: {member.trouble}, in {self.path}", "image broken")
        check_size(name, member.size)
        return read_exactly(self.handle, member)


def _roots_of(archive: Path) -> list[tuple[str, ...]]:
    """The paths of the folders that may have been packed into an archive."""
    stems = dict.fromkeys([archive.stem, archive.stem.removesuffix("_images")])
    return [(*folder, stem) for folder in folders_of(archive.parent) for stem in stems]


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
