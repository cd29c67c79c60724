"""Rows and pictures that tests make up: picture number n is of one colour, which tells n."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image

from minimind_v.core.errors import RowError

PATCHES = 4  # placeholders per picture
SIZE = 16  # pixels of its side


def shade(number: int) -> list[int]:
    """The colour of picture `number`."""
    return [number % 256, 255 - number % 256, number // 256]


def picture(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 18), tuple(shade(number))).save(buffer, kind)
    return buffer.getvalue()


def png_header(width, height) -> bytes:
    """The beginning of a PNG that claims a size, and a little data."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def row(question, answer, image=None, roles=("user", "assistant")) -> bytes:
    """One line of a data file."""
    talk = [{"role": role, "content": text} for role, text in zip(roles, (question, answer), strict=True)]
    return json.dumps({"conversations": talk} | ({"image": image} if image is not None else {})).encode()


def use(rows, number):
    """Read a row to train on. Raises RowError where it is broken or has no conversation."""
    row = rows.row(number)
    if row.conversations is None:
        raise RowError("no conversation")
    return [rows.picture(number, position, name) for position, name in enumerate(row.images)]


def pixels_of(example):
    """The pixels of an example's images, [N, 3, S, S]."""
    return np.stack([image.pixels for image in example.images])
