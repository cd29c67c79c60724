"""The members of a tar, read in place; each header is checked against the archive's size."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minimind_v.core.errors import RowError

BLOCK = 512  # bytes; headers begin at multiples of it
ZEROS = 2**20  # bytes of zeros after which an archive has ended
HEADER_LIMIT = 2**20  # bytes of a name or of extended fields
CHAIN = 16  # headers that may belong to one member
SPARSE_MAPS = 10_000  # blocks that a sparse member may need to describe itself
NO_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)


@dataclass(frozen=True)
class Member:
    """A member of an archive, not a folder; `trouble` is the reason why its bytes cannot be read."""

    name: str
    start: int  # of its first header
    data: int
    size: int
    trouble: str = ""

    @property
    def end(self) -> int:
        return self.data + -(-self.size // BLOCK) * BLOCK

    @property
    def names(self) -> list[str]:
        """The readings of its name; one that is not UTF-8 may be GBK."""
        try:
            self.name.encode()
        except UnicodeEncodeError:
            raw = self.name.encode("utf-8", "surrogateescape")
            return [raw.decode("gbk", "replace"), raw.decode("utf-8", "replace")]
        return [self.name]

    @property
    def key(self) -> tuple[str, str]:
        """The name of its sample and, in small letters, its ending; both empty where it belongs to no sample."""
        folder, slash, name = self.name.rpartition("/")
        stem, _, ending = name.partition(".")
        return (folder + slash + stem, ending.lower()) if stem and ending else ("", "")


class DamagedTar(Exception):
    """Damage in an archive from byte `at` on; `cut` where the archive is only too short."""

    def __init__(self, message: str, at: int, cut: bool = False) -> None:
        super().__init__(f"{message}, at byte {at}")
        self.at, self.cut = at, cut


def read_members(file: Any, begin: int = 0, end: int | None = None) -> Iterator[Member]:
    """The members whose headers begin between two offsets of an archive. Raises DamagedTar."""
    handle = file.fileno()
    length = os.fstat(handle).st_size
    at = begin
    while at < (length if end is None else end):
        block = os.pread(handle, BLOCK, at)
        if len(block) == BLOCK and not any(block):
            zeros = os.pread(handle, ZEROS, at)
            rest = zeros.lstrip(b"\0")
            if not rest:
                return
            at += (len(zeros) - len(rest)) // BLOCK * BLOCK
            continue
        member, is_folder = _read_member(handle, at, length)
        if not is_folder:
            yield member
        at = max(member.end, member.data)


def _read_member(handle: int, start: int, length: int) -> tuple[Member, bool]:
    """The member whose first header begins at `start`, and whether it is a folder."""
    at, name = start, ""
    fields: dict[str, str] = {}
    for _ in range(CHAIN):
        block = os.pread(handle, BLOCK, at)
        if len(block) < BLOCK:
            raise DamagedTar("the archive is cut off within a header", start, cut=True)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise DamagedTar(f"no header of a member ({error})", at) from None
        if info.size < 0:
            raise DamagedTar(f"a member of {info.size} bytes", at)
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if info.size > HEADER_LIMIT:
                raise DamagedTar(f"a header of {info.size} bytes", at)
            body = os.pread(handle, info.size, at + BLOCK)
            if len(body) < info.size:
                raise DamagedTar("the archive is cut off within a header", start, cut=True)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = body.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            else:
                fields |= _extended(body, at)
        elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            return _member(handle, info, start, at, length, name, fields)
        at += BLOCK + -(-info.size // BLOCK) * BLOCK
    raise DamagedTar(f"more than {CHAIN} headers of one member", start)


def _member(
    handle: int, info: tarfile.TarInfo, start: int, at: int, length: int, name: str, fields: dict[str, str]
) -> tuple[Member, bool]:
    """The member that its last header and the headers before it describe, and whether it is a folder."""
    name, data, size, trouble = fields.get("path") or name or info.name, at + BLOCK, info.size, ""
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in fields):
        trouble = "stored as a sparse file, which is not supported"
        if info.type == tarfile.GNUTYPE_SPARSE:
            data = _end_of_maps(handle, at)
    if "size" in fields:
        if not (fields["size"].isdecimal() and len(fields["size"]) < 20):
            raise DamagedTar(f"a member of {fields['size']:.30} bytes", at)
        size = int(fields["size"])
    if info.type in NO_DATA:
        size, trouble = 0, "a link; links are not followed" if info.type in LINKS else "not a file"
    elif info.type not in (*tarfile.REGULAR_TYPES, tarfile.GNUTYPE_SPARSE):
        trouble = "not a file"
    if data + size > length:
        available = max(length - data, 0)
        trouble, size = f"cut off: the archive ends after {available:,} of {size:,} bytes", available
    return Member(name, start, data, size, trouble), info.isdir()


def _end_of_maps(handle: int, at: int) -> int:
    """The offset of the data of an old sparse member, behind its maps."""
    more = os.pread(handle, BLOCK, at)[482:483]
    at += BLOCK
    for _ in range(SPARSE_MAPS):
        if more in (b"\0", b""):
            return at
        more = os.pread(handle, BLOCK, at)[504:505]
        at += BLOCK
    raise DamagedTar(f"a sparse member of more than {SPARSE_MAPS} maps", at)


def _extended(body: bytes, at: int) -> dict[str, str]:
    """The extended fields of a member: records of a length, a name and a value."""
    fields: dict[str, str] = {}
    begin = 0
    while begin < len(body) and body[begin] != 0:
        digits = body[begin : begin + 20].split(b" ", 1)[0]
        size = int(digits) if digits.isdigit() else 0
        key, equals, value = body[begin + len(digits) + 1 : begin + size].partition(b"=")
        if size <= len(digits) or begin + size > len(body) or not equals:
            raise DamagedTar("unreadable extended fields", at)
        fields[key.decode("utf-8", "replace")] = value.removesuffix(b"\n").decode("utf-8", "surrogateescape")
        begin += size
    return fields


def read_exactly(file: Any, member: Member) -> bytes:
    """The bytes of a member. Raises RowError."""
    data = os.pread(file.fileno(), member.size, member.data)
    if len(data) < member.size:  # the file has become shorter
        raise RowError(f"{member.name}: cut off", "tar")
    return data
