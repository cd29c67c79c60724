"""Reduce PNGs to their pixels, without unpacking or checking texts and profiles."""

from __future__ import annotations

import re
import struct
import zlib

MAGIC = b"\x89PNG\r\n\x1a\n"
CHUNK_LIMIT = 100_000  # of one file; the largest image has some 40,000 of the usual eight kilobytes

_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"}  # of the first frame, and its orientation
_CHECKED = {b"tRNS", b"eXIf"}  # dropped if broken; the decoder checks the others
_TURNING = {b"Raw profile type exif": 2**17, b"XML:com.adobe.xmp": 2**20}  # texts that can hold an orientation: bytes
_KIND = re.compile(rb"[A-Za-z]{4}")
_Chunk = tuple[bytes, int, int]  # kind, begin and end with length, kind and check sum


def keep_pixels(data: bytes) -> bytes:
    """The file without chunks that do not change its pixels; the same file if it has none of these.

    Raises ValueError if there are too many chunks.
    """
    chunks = _walk(data)
    if not any(kind == b"IDAT" for kind, _, _ in chunks) or _is_plain(data, chunks):
        return data
    head, pixels, turning = [], [], {}
    for kind, begin, end in chunks:
        if kind == b"IDAT":
            pixels.append(data[begin:end])
        elif kind in _CHECKED:
            if _is_whole(data, begin, end):
                head.append(data[begin:end])
        elif kind in (b"IHDR", b"PLTE"):
            if not pixels:
                head.append(data[begin:end])
        elif (keyword := _keyword(data, begin)) and _is_small_enough(data, begin, end, _TURNING[keyword]):
            turning[keyword] = data[begin:end]  # the last one counts
    return b"".join((MAGIC, *head, *turning.values(), *pixels, b"\0\0\0\0IEND\xaeB`\x82"))


def _walk(data: bytes) -> list[_Chunk]:
    """All chunks up to the end, or up to other data."""
    chunks: list[_Chunk] = []
    at = len(MAGIC)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind not in _PIXELS and not _KIND.fullmatch(kind):
            break
        chunks.append((kind, at, at + 12 + length))
        if len(chunks) > CHUNK_LIMIT:
            raise ValueError(f"more than {CHUNK_LIMIT} chunks")
        at += 12 + length
        if kind == b"IEND":
            break
    return chunks


def _is_plain(data: bytes, chunks: list[_Chunk]) -> bool:
    """Whether a file has only chunks for its pixels, undamaged, and the IDAT chunks are consecutive."""
    kinds = [kind for kind, _, _ in chunks]
    first = kinds.index(b"IDAT")
    return (
        _PIXELS.issuperset(kinds)
        and set(kinds[first : first + kinds.count(b"IDAT")]) == {b"IDAT"}
        and all(_is_whole(data, begin, end) for kind, begin, end in chunks if kind in _CHECKED)
    )


def _keyword(data: bytes, begin: int) -> bytes | None:
    return next((keyword for keyword in _TURNING if data.startswith(keyword + b"\0", begin + 8)), None)


def _is_whole(data: bytes, begin: int, end: int) -> bool:
    return end <= len(data) and zlib.crc32(data[begin + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])


def _is_small_enough(data: bytes, begin: int, end: int, limit: int) -> bool:
    """Whether a text is undamaged and has at most `limit` bytes. Unpacks at most `limit` bytes."""
    if not _is_whole(data, begin, end):
        return False
    kind = data[begin + 4 : begin + 8]
    _, _, text = data[begin + 8 : end - 4].partition(b"\0")
    if kind == b"zTXt":
        packed: bytes | None = text[1:]
    elif kind == b"iTXt" and text[:1] == b"\1":
        packed = b"".join(text[2:].split(b"\0", 2)[2:])
    else:
        packed = None
    if packed is None:
        return kind in (b"tEXt", b"iTXt") and len(text) <= limit
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, limit)
    except zlib.error:
        return False
    return not unpacking.unconsumed_tail
