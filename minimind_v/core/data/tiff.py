"""The memory that a TIFF's first directory needs, checked before Pillow reads it; EXIF is also a TIFF."""

from __future__ import annotations

import struct

VALUE_LIMIT = 300_000  # numbers in a directory: offsets and lengths of 150,000 strips
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_BYTES = {1, 2, 6, 7}  # types that Pillow reads in one piece


def is_bounded(data: bytes) -> bool:
    """Whether the fields need little more memory than the file, and their numbers can be read in good time.

    Many fields with the same bytes turn a small file into gigabytes. Pillow does not read behind the end of the file.
    """
    order = ">" if data[:1] == b"M" else "<"
    big = data[2:4] in (b"+\0", b"\0+")
    head, count, entry, inside = ("Q", "Q", "HHQQ", 8) if big else ("I", "H", "HHII", 4)
    try:
        (begin,) = struct.unpack_from(order + head, data, 8 if big else 4)
        (fields,) = struct.unpack_from(order + count, data, begin)
    except (struct.error, OverflowError):
        return True  # nothing is readable
    begin, step = begin + struct.calcsize(order + count), struct.calcsize(order + entry)
    room, values = 2 * len(data) + 65536, 0
    for at in range(begin, min(begin + fields * step, len(data) - step + 1), step):
        _, kind, number, offset = struct.unpack_from(order + entry, data, at)
        size = number * _SIZES.get(kind, 0)
        if size <= inside or offset + size > len(data):
            continue
        room -= size
        values += 0 if kind in _BYTES else number
        if room < 0 or values > VALUE_LIMIT:
            return False
    return True
