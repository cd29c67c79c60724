"""Read the directory and the members of a zip in place; member names may be in any encoding."""

from __future__ import annotations

import contextlib
import hashlib
import re
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote

from minimind_v.core.rows.names import PicturePath

ENTRY = struct.Struct("<4s6H3L5H2L")  # of the directory, before a name, extra fields and a comment
HEADER = struct.Struct("<4s5H3L2H")  # before a member's data, its name and its extra fields
ZIP64, UNICODE_PATH = 0x0001, 0x7075  # extra fields, the second of which begins with `up`
ENCRYPTED, UTF8 = 0x0001, 0x0800  # flags
STORED, DEFLATED = 0, 8  # the two methods whose unpacking can be bounded
METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 20: "Zstandard", 93: "Zstandard", 95: "xz", 98: "PPMd"}
ABSENT = 0xFFFFFFFF  # the number is in the zip64 field
PLAIN = re.compile(rb"[^%\\]*[^%\\/.]")  # paths whose last name has one spelling but for case
PIECE = 2**20  # bytes of the directory that are read together


class Member(NamedTuple):
    """An entry of the directory."""

    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int
    extra: bytes

    @property
    def names(self) -> list[str]:
        """The readings of its name, the likeliest first: few zips state the encoding of names."""
        raw = self.raw_name
        readings = [unicode_path] if (unicode_path := self._unicode_path()) else []
        for encoding in ("utf-8",) if raw.isascii() or self.flags & UTF8 else ("utf-8", "gbk", "cp437"):
            with contextlib.suppress(UnicodeDecodeError):
                readings.append(raw.decode(encoding))
        return list(dict.fromkeys(readings or [raw.decode("utf-8", "replace")]))

    def _unicode_path(self) -> str | None:
        """The name in the Info-ZIP Unicode Path field, where its checksum matches the raw name."""
        value = extra_field(self.extra, UNICODE_PATH) if self.extra else b""
        if value[:5] != b"\x01" + struct.pack("<L", zlib.crc32(self.raw_name)):
            return None
        return value[5:].decode("utf-8", "replace") or None


def directory(file: BinaryIO) -> tuple[int, int, int, int]:
    """Begin, end and number of entries of the directory, and the bytes before the zip. Raises BadZipFile."""
    # The library finds all forms (zip64, a comment behind, data in front).
    record = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if not record:
        raise zipfile.BadZipFile("File is not a zip file")
    signature, count, size, offset, end = record[0], record[4], record[5], record[6], record[9]
    if signature == b"PK\x06\x06":
        end -= 56 + 20  # between them are zip64's record and locator
    prefix = end - size - offset
    if end - size < 0 or prefix < 0:
        raise zipfile.BadZipFile("Bad offset for central directory")
    return end - size, end, count, prefix


def entries(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, Member]]:
    """Each entry between two offsets of the file, and its own offset. Raises BadZipFile."""
    rest = b""
    file.seek(begin)
    while fresh := file.read(min(PIECE, end - begin - len(rest))):
        data, at = rest + fresh, 0
        while (length := _entry_length(data, at)) and at + length <= len(data):
            yield begin + at, _parse(data, at)
            at += length
        rest, begin = data[at:], begin + at
    if rest:
        raise zipfile.BadZipFile("Truncated central directory")


def entry_at(file: BinaryIO, offset: int) -> Member:
    """The entry at an offset. Raises BadZipFile."""
    file.seek(offset)
    data = file.read(ENTRY.size)
    length = _entry_length(data, 0)
    data += file.read(length - ENTRY.size if length else 0)
    if not length or len(data) < length:
        raise zipfile.BadZipFile("Truncated central directory")
    return _parse(data, 0)


def _entry_length(data: bytes, at: int) -> int:
    """The bytes of the entry at a position; 0 where its fixed fields are cut off."""
    if at + ENTRY.size > len(data):
        return 0
    return ENTRY.size + sum(struct.unpack_from("<3H", data, at + 28))


def _parse(data: bytes, at: int) -> Member:
    fields = ENTRY.unpack_from(data, at)
    if fields[0] != b"PK\x01\x02":
        raise zipfile.BadZipFile("Bad magic number for central directory")
    flags, method = fields[3:5]
    crc, packed, size, name_length, extra_length = fields[7:12]
    offset, at = fields[16], at + ENTRY.size
    extra = data[at + name_length : at + name_length + extra_length]
    if ABSENT in (size, packed, offset):
        numbers = extra_field(extra, ZIP64)
        wide = iter(struct.unpack_from(f"<{len(numbers) // 8}Q", numbers))
        size, packed, offset = (next(wide, n) if n == ABSENT else n for n in (size, packed, offset))
    return Member(data[at : at + name_length], flags, method, crc, packed, size, offset, extra)


def extra_field(extra: bytes, kind: int) -> bytes:
    """The content of an extra field; empty without one."""
    at = 0
    while at + 4 <= len(extra):
        field, length = struct.unpack_from("<2H", extra, at)
        if field == kind:
            return extra[at + 4 : at + 4 + length]
        at += 4 + length
    return b""


def unpack(file: BinaryIO, member: Member, prefix: int) -> bytes:
    """The bytes of a stored or deflated member, never more than its directory entry states. Raises BadZipFile."""
    file.seek(prefix + member.offset)
    header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise zipfile.BadZipFile("no file header where its directory says")
    name_length, extra_length = HEADER.unpack(header)[9:]
    if file.read(name_length) != member.raw_name:
        raise zipfile.BadZipFile("its file header and its directory have different names")
    file.seek(extra_length, 1)
    data = file.read(member.packed)
    if member.method == DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
        except zlib.error as error:
            raise zipfile.BadZipFile(str(error)) from None
    if len(data) != member.size:
        raise zipfile.BadZipFile("its size differs from its directory entry")
    if zlib.crc32(data) != member.crc:
        raise zipfile.BadZipFile("its checksum differs from its directory entry")
    return data


def hash_name(name: str) -> int:
    """A hash of a file name, of 64 bits; the same for differences of composition, percent-encoding and case."""
    if name.isascii() and "%" not in name:
        return hash_bytes(name.lower().encode())
    return hash_bytes(unicodedata.normalize("NFC", unquote(name)).casefold().encode("utf-8", "surrogatepass"))


def hashes(member: Member) -> set[int]:
    """The hashes of a member in the index, one for each reading of its name; none for a folder."""
    raw = member.raw_name
    if raw.isascii() and PLAIN.fullmatch(raw) and b"up" not in member.extra:  # nearly all: the fast path
        return {hash_bytes(raw[raw.rfind(b"/") + 1 :].lower())}
    paths = [PicturePath.of(name).names for name in member.names]
    return {hash_name(names[-1]) for names in paths if names and not raw.endswith(b"/")}


def hash_bytes(data: bytes, kind: bytes = b"") -> int:
    """A hash of 64 bits; the same data has another for each `kind`."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=kind).digest(), "little")
