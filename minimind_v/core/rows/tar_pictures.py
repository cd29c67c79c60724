"""Pictures in a tar, by name; the tar is read in place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows.members import hash_name
from minimind_v.core.rows.names import PicturePath
from minimind_v.core.rows.pictures import ArchivePictures
from minimind_v.core.rows.row import check_size
from minimind_v.core.rows.strangers import stand_in
from minimind_v.core.rows.tar_members import DamagedTar, Member, read_exactly, read_members

PICTURES_KIND = "tar members: hash of a reading of the folded file name, place of the header"  # of the index


class TarPictures(ArchivePictures[Member]):
    """Pictures in a tar, found by the same names as in a zip."""

    damage = (DamagedTar, OSError, StopIteration)

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is damaged or not a tar; a cut off tar keeps its whole members."""
        if trouble := stand_in(path):
            raise DataError(f"{path}: {trouble}")
        super().__init__(path, PICTURES_KIND, "pictures")

    def _hashed_names(self) -> Iterator[tuple[int, int]]:
        try:
            for member in read_members(self.handle):
                for name in member.names:
                    yield hash_name("".join(PicturePath.of(name).names[-1:])), member.start
        except DamagedTar as error:
            if not error.cut:
                raise DataError(f"{self.path}: damaged ({error}) — download it again") from None

    def _namesakes(self, last: str) -> dict[str, Member]:
        members = [next(read_members(self.handle, offset)) for offset in self._offsets(last)]
        return {"/".join(PicturePath.of(member.name).names): member for member in members}

    def read(self, name: str) -> bytes:
        member = self._member(name)
        if member.trouble:
            raise RowError(f"{name}: {member.trouble}, in {self.path}", "picture broken")
        check_size(name, member.size)
        return read_exactly(self.handle, member)
