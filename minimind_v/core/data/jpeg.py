"""Decode JPEGs and detect missing data, which libjpeg silently fills with grey.

The decoder gets the data of the scans only, and a little padding that it may read ahead but does not need. If it asks
for more, the file is cut off, with or without an end marker; if it does not, the image is whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image, ImageFile

from minimind_v.core.data.tiff import is_bounded

SCAN_LIMIT = 100  # of one image; about ten are usual, and each costs a pass over all pixels
WORK_LIMIT = 2_000_000_000  # scans × pixels: twenty scans of the largest image
EXIF_LIMIT = 16  # EXIF segments: Pillow copies each as often as others follow
PHOTOSHOP_LIMIT = 2**20  # bytes of Photoshop's notes, which Pillow parses one by one
SEGMENT_LIMIT = 10_000  # of one file; a profile of a megabyte takes sixteen
GAP_LIMIT = 1_000_000  # bytes before the first scan that belong to no segment: Pillow reads them one at a time
BREAKS_OFF = "the file is cut off"

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # no stuffed byte, restart or fill byte
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_TEM, _DHT, _SOS, _DRI = 0x01, 0xC4, 0xDA, 0xDD
_APP1, _APP13, _EXIF = 0xE1, 0xED, b"Exif\0\0"
_FRAMES = {*range(0xC0, 0xD0)} - {_DHT, 0xC8, 0xCC}
_SEGMENTS = {*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE} - {0xC8}  # markers that a length follows
_HUFFMAN = {0xC0, 0xC1, 0xC2}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_MISSING = 255  # instead of a number of bits: no scan has this coefficient

# libjpeg reads up to seven bytes ahead. These bits make blocks long. Measured over files cut in each of their last 40
# bytes: 3 % of grey files and 4 % of progressive ones pass as whole, and hardly any in colour; all of them lack one or
# two bytes, and `_is_suspicious` suspects most.
_AHEAD = 7
_COLOUR, _GREY, _BUFFERED = b"\xee" * _AHEAD, b"\xe2" * _AHEAD, b"\0" * _AHEAD
_OTHER_BITS = bytes((214 + 97 * at) % 255 for at in range(120))  # other bits, which change an incomplete image


@dataclass
class Layout:
    """The scans of a file, by its markers."""

    frame: int = 0  # the frame's marker, which defines the coding
    width: int = 0
    height: int = 0
    components: int = 0
    buffered: bool = False  # the decoder reads all scans before it returns a line
    scans: int = 0
    begin: int = 0  # of the data of the last scan
    end: int = 0
    followed: bool = False  # the last scan is, by a marker
    restarts: bool = False
    exif: list[tuple[int, int]] = field(default_factory=list)  # begin and end of its segments, markers included
    photoshop: list[tuple[int, int]] = field(default_factory=list)  # the same of Photoshop's notes
    tables: list[tuple[int, int]] = field(default_factory=list)  # begin and end of Huffman tables
    last_table: int = 0  # of the AC coefficients of the last component in the last scan
    missing_bits: dict[int, list[int]] = field(default_factory=dict)  # of each of a component's 64 coefficients

    @property
    def waits(self) -> bool:
        """Whether the decoder can wait for more data: an arithmetic decoder cannot."""
        return self.frame in _HUFFMAN and self.scans > 0


def read_layout(data: bytes) -> Layout:
    """Read the markers. Raises ValueError if there are too many to decode the file in good time."""
    layout, at, segments, gaps = Layout(), 2, 0, 0
    while marker := _MARKER.search(data, at):
        if layout.scans and not layout.followed:
            layout.end, layout.followed = marker.start(), True
            if not layout.buffered:
                return layout
        elif not layout.scans:
            gaps += marker.start() - at
        at, kind = marker.end(), data[marker.end() - 1]
        if kind == _TEM:
            continue
        length, segments = int.from_bytes(data[at : at + 2]), segments + 1
        if kind not in _SEGMENTS or length < 2 or at + length > len(data):
            return layout  # the end, or a place where decoders stop
        if kind == _SOS and (length < 8 or length != 6 + 2 * data[at + 2]):
            return layout
        if segments > SEGMENT_LIMIT or gaps > GAP_LIMIT:
            raise ValueError(f"more than {SEGMENT_LIMIT} segments" if gaps <= GAP_LIMIT else "no segments for long")
        _read_segment(layout, kind, data, at, at + length)
        at += length
        if kind == _SOS:
            layout.begin, layout.end, layout.followed = at, len(data), False
    return layout


def drop_hostile_segments(data: bytes, layout: Layout) -> bytes:
    """The file without EXIF or Photoshop's notes that would take too much memory or time."""
    blocks = [data[begin + 4 + len(_EXIF) : end] for begin, end in layout.exif[: EXIF_LIMIT + 1]]
    exif_is_bounded = len(blocks) <= EXIF_LIMIT and (not blocks or is_bounded(b"".join(blocks)))
    hostile = [] if exif_is_bounded else layout.exif
    if sum(end - begin for begin, end in layout.photoshop) > PHOTOSHOP_LIMIT:
        hostile = sorted(hostile + layout.photoshop)
    if not hostile:
        return data
    edges = [0, *(edge for segment in hostile for edge in segment), len(data)]
    return b"".join(data[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True))


def _read_segment(layout: Layout, kind: int, data: bytes, begin: int, end: int) -> None:
    body = data[begin + 2 : end] if kind in _FRAMES or kind in (_SOS, _DRI) else b""
    if kind in _FRAMES and not layout.scans and len(body) >= 6:
        layout.frame, layout.height, layout.width = kind, int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
        layout.components = body[5]
    elif kind == _DHT:
        layout.tables.append((begin + 2, end))
    elif kind == _APP1 and not layout.scans and data.startswith(_EXIF, begin + 2):
        layout.exif.append((begin - 2, end))
    elif kind == _APP13 and not layout.scans:
        layout.photoshop.append((begin - 2, end))
    elif kind == _DRI:
        layout.restarts = any(body)
    elif kind == _SOS:
        _read_scan(layout, body)


def _read_scan(layout: Layout, body: bytes) -> None:
    """The components and coefficients of a scan."""
    count = body[0]
    layout.scans += 1
    layout.buffered = layout.buffered or count < layout.components or layout.frame in _PROGRESSIVE
    if layout.scans >= SCAN_LIMIT:
        raise ValueError(f"more than {SCAN_LIMIT} scans")
    if layout.scans * layout.width * layout.height > WORK_LIMIT:
        raise ValueError(f"{layout.scans} scans of {layout.width}×{layout.height} pixels")
    layout.last_table = body[2 * count] & 15
    first, last, bits = (*body[-3:-1], body[-1] & 15) if layout.frame in _PROGRESSIVE else (0, 63, 0)
    for component in body[1 : 1 + 2 * count : 2]:
        coefficients = layout.missing_bits.setdefault(component, [_MISSING] * 64)
        coefficients[first : last + 1] = [bits] * (min(last, 63) + 1 - first)


def load(image: Image.Image, layout: Layout, data: bytes, reopen: Callable[[], Image.Image]) -> None:
    """Decode all pixels. Raises ValueError if data is missing.

    If the last bytes may be missing, the file of `reopen` is decoded twice at full size, with other bits behind its end
    each time: all pixels must be equal.
    """
    if layout.buffered and (
        len(layout.missing_bits) < layout.components or any(map(any, layout.missing_bits.values()))
    ):
        raise ValueError(f"{BREAKS_OFF}: scans are missing")
    scans = _without_filling(data, layout)
    padding = _BUFFERED if layout.buffered else (_COLOUR if layout.components > 1 else _GREY)
    _feed(image, layout, scans, padding)
    if _is_suspicious(layout, data, scans):
        copies = reopen(), reopen()
        for copy, bits in zip(copies, (padding, _OTHER_BITS), strict=True):
            _feed(copy, layout, scans, bits)
        if copies[0].tobytes() != copies[1].tobytes():
            raise ValueError(BREAKS_OFF)


def _without_filling(data: bytes, layout: Layout) -> bytes:
    """The data up to the end of the last scan, without half a marker or the zeros of an incomplete download."""
    end = layout.end
    if not layout.followed and data.endswith(b"\0\0"):
        end = len(data.rstrip(b"\0"))
        if data[end - 1] == 0xFF:
            end += 1  # a stuffed byte
    while end > layout.begin and data[end - 1] == 0xFF:
        end -= 1
    return data[:end]


def _feed(image: Image.Image, layout: Layout, scans: bytes, padding: bytes) -> None:
    """Decode an image's scans only."""
    image.load_prepare()  # type: ignore[attr-defined]
    codec, extents, _, arguments = image.tile[0]  # type: ignore[attr-defined]
    # As `Image.load`, which does not return how much data the decoder took.
    decoder = Image._getdecoder(image.mode, codec, arguments, image.decoderconfig)  # type: ignore[attr-defined]
    try:
        decoder.setimage(image.im, extents)
        taken, error = decoder.decode(scans + padding)
        if layout.buffered and taken >= 0:
            taken, error = _finish(decoder, layout, scans, taken - len(scans) - len(padding))
    finally:
        decoder.cleanup()
    if error < 0:
        raise ValueError("broken data stream when reading image file")
    if taken >= 0:
        raise ValueError(BREAKS_OFF)
    image.tile = []  # type: ignore[attr-defined]


def _finish(
    decoder: Image.core.ImagingDecoder | ImageFile.PyDecoder, layout: Layout, scans: bytes, left: int
) -> tuple[int, int]:
    """Decode an end marker: a decoder with all its scans skips data up to it, but inside a scan it waits for more."""
    if left >= 0 and layout.restarts:  # it may wait for a restart; else it skips this one
        numbers = [match[0][1] for match in _RESTART.finditer(scans, layout.begin)]
        restart = bytes([0xFF, 0xD0 + (numbers[-1] + 1) % 8 if numbers else 0xD0])
        left = decoder.decode(restart)[0] - len(restart)
    if left >= 0:
        left = decoder.decode(b"\0")[0] - 1
    return decoder.decode(b"\xff\xd9") if left >= 0 else (0, 0)


def _is_suspicious(layout: Layout, data: bytes, scans: bytes) -> bool:
    """Whether the last bytes may be missing: no marker follows, or the data does not end as encoders end it."""
    if not layout.followed:
        return True
    if layout.buffered:
        return not scans[-1] & 1  # encoders fill the last byte with ones
    code = _end_of_block(layout, data)
    bits = int.from_bytes(scans[-8:].replace(b"\xff\0", b"\xff")[-4:])
    return not any(
        bits & (1 << ones) - 1 == (1 << ones) - 1 and f"{bits >> ones & 0xFFFF:016b}".endswith(code)
        for ones in range(8)
    )


def _end_of_block(layout: Layout, data: bytes) -> str:
    """The code for the end of a block, as zeros and ones."""
    end_code = "no such code"
    for begin, end in layout.tables:
        at = begin
        while at + 17 <= end:
            counts, symbols = data[at + 1 : at + 17], data[at + 17 : at + 17 + sum(data[at + 1 : at + 17])]
            if data[at] == 0x10 | layout.last_table and (position := symbols.find(b"\0")) >= 0:
                end_code = _code(counts, position)
            at += 17 + len(symbols)
    return end_code


def _code(counts: bytes, position: int) -> str:
    """The code of the symbol at this position of a canonical Huffman table."""
    code = 0
    for length, count in enumerate(counts, 1):
        code *= 2
        if position < count:
            return f"{code + position:0{length}b}"
        code, position = code + count, position - count
    return "no such code"
