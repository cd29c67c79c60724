"""Decode a picture file and preprocess it for CLIP, as published; the pixels stay uint8 until the model.

Two things differ from the published code on purpose: pictures are turned upright as their EXIF says, and 16 bits and
floats are scaled to 8 where Pillow's `convert` would clip them. Everything else is equal to one grey level, but for
large JPEGs: these are decoded at 1/2, 1/4 or 1/8 of their size ("draft"), see `DRAFT_MARGIN`.
"""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin
from PIL.Image import Transpose

from minimind_v.core.data import jpeg, png, tiff
from minimind_v.core.errors import RowError

PIXEL_LIMIT = 100_000_000  # pixels of one picture; a few kilobytes can unpack to gigabytes
HUNGRY = {"WEBP": 50_000_000, "AVIF": 50_000_000}  # their decoders hold 16 bytes and more of each; others four to nine
SIDE_LIMIT = 2**20  # pixels of a side: each row of a picture takes memory and time of its own
# Bytes in which an image must begin, where Pillow reads what stands before it byte by byte: comments in PPM and GIF.
HEADER_LIMIT = 2**20
LONG_HEADERS = (b"GIF8", *(b"P" + kind for kind in (b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"f", b"y")))
TILE_LIMIT = 4096**2  # pixels of a TIFF's tile, which may be larger than the picture and is unpacked whole
TEXT_LIMIT = 2_000_000  # pixels of a PPM that is text, or has levels of its own: Pillow reads them in Python
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF")  # no programs, no drawings, no guesses

# The short side of a draft is at least so many times the model's. Measured against decoding at full size, in grey
# levels of 255 in the 224² pixels that CLIP is shown, over pictures with a natural (1/f) spectrum, edges and text
# (`python -m benchmarks.pictures`):
#   short side of the draft   2.1 × 224   2.7 ×   3.3 ×
#   mean difference                 1.1     0.7     0.4
#   largest                          21      14       7
DRAFT_MARGIN = 2
DARK = 80  # the highest level that is no more than dark
SAMPLE = 512  # pixels of a side that are enough to tell how dark an image is
# What else than its bytes decides a picture's pixels: features are remembered under it. A change of code changes 1.
RENDERING = f"2, margin {DRAFT_MARGIN}, Pillow {Image.__version__}"

TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TURNS = {  # EXIF orientation (tag 0x0112) → what brings the picture upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
STRANGERS = {  # first bytes of what is found in the place of pictures
    b"<!doctype html": "an HTML page: the web page of a picture was saved instead of the picture",
    b"<html": "an HTML page: the web page of a picture was saved instead of the picture",
    b"version https://git-lfs": "a git-lfs pointer, not the picture: run `git lfs pull` in its repository",
    b"<svg": "an SVG drawing: save it as PNG",
    b"<?xml": "XML, perhaps an SVG drawing: save it as PNG",
    b"%!ps": "PostScript, a program and not a picture: save it as PNG",
    b"%pdf": "a PDF document: save its page as PNG",
    b"8bps": "a Photoshop file: save it as PNG",
    b"pk\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"{": "JSON text: perhaps a server's error message was saved instead of the picture",
}
BRANDS = {b"hei": "HEIC", b"hev": "HEIC", b"mif": "HEIF", b"msf": "HEIF"}  # in an ISO media file, behind `ftyp`

# Pillow's complaints about files that it reads all the same would break into the terminal, from every data worker.
# Set here once: `warnings.catch_warnings` around every picture would not be safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode(data: bytes, name: str) -> Image.Image:
    """Decode a picture at its full size: upright, RGB. Raises RowError naming `name`."""
    with _blame(name):
        picture = _load(data, None)[0]
        return _turn(_to_eight_bits(picture), _orientation(picture)).convert("RGB")


def load_pixels(data: bytes, name: str, size: int, resize_mode: str = "crop") -> np.ndarray:
    """Decode and prepare a picture: uint8 [3, size, size]. Raises RowError naming `name`.

    resize_mode: `crop` keeps the middle of the longer side; `squeeze` keeps all of the image, and not its aspect.
    """
    with _blame(name):
        return _prepare(*_load(data, size), size, resize_mode)


def is_dark_on_transparent(data: bytes) -> bool:
    """Whether an image shows dark on a transparent background that is dark as well where alpha is left out.

    Training leaves it out, as the published conversion does, and such a drawing is then black on black.
    """
    if data.startswith(b"\xff\xd8"):
        return False
    with suppress(Exception):
        picture = _open(png.keep_pixels(data) if data.startswith(png.MAGIC) else data)
        if picture.mode.startswith("I") or not picture.has_transparency_data:
            return False
        picture = _load(data, None)[0]
        picture.thumbnail((SAMPLE, SAMPLE), Image.Resampling.NEAREST)  # it mixes no colours
        levels = np.asarray(picture.convert("RGBA"))
        light, shown = levels[..., :3].max(2) > DARK, levels[..., 3] >= 128
        return all(pixels.mean() >= 0.01 and light[pixels].mean() < 0.1 for pixels in (shown, ~shown))
    return False


def to_pixels(picture: Image.Image, size: int, resize_mode: str = "crop", name: str = "the image") -> np.ndarray:
    """Prepare a decoded image as `load_pixels` does. Raises RowError naming `name`."""
    with _blame(name):
        return _prepare(picture, picture.size, size, resize_mode)


def _prepare(picture: Image.Image, extent: tuple[float, float], size: int, resize_mode: str) -> np.ndarray:
    """Resize (bicubic) to uint8 [3, size, size]: CLIPImageProcessor's resize and centre crop, or a squeeze.

    The vision encoder normalises: four times fewer bytes travel from the data workers.
    """
    eight_bits = _to_eight_bits(picture)
    if resize_mode == "squeeze":
        small = eight_bits.resize((size, size), Image.Resampling.BICUBIC, (0, 0, *extent))
    else:
        small = _shrink(eight_bits, size, extent)
    return _crop(_turn(small, _orientation(picture)), size)


def blank_pixels(size: int) -> np.ndarray:
    """A picture that shows nothing: mid-grey, uint8 [3, size, size]."""
    return np.full((3, size, size), 128, dtype=np.uint8)


# --- from bytes -------------------------------------------------------------------------------------------------------


@cache
def _formats() -> list[str]:
    """Those that this Pillow can read: AVIF came late."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _open(data: bytes) -> Image.Image:
    """Read the header, and refuse by it what would unpack to too much."""
    if len(data) > HEADER_LIMIT and data.startswith(LONG_HEADERS):
        try:
            Image.open(io.BytesIO(data[:HEADER_LIMIT]), formats=("PPM", "GIF"))
        except Exception:
            raise ValueError(f"no image starts in its first {HEADER_LIMIT:,} bytes") from None
    try:
        picture = Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        raise ValueError(_describe(data)) from None
    if picture.width * picture.height > min(PIXEL_LIMIT, HUNGRY.get(picture.format or "", PIXEL_LIMIT)):
        raise Image.DecompressionBombError(f"{picture.width}×{picture.height} pixels are too many")
    if max(picture.size) > SIDE_LIMIT:
        raise Image.DecompressionBombError(f"{picture.width}×{picture.height} pixels: a side is too long")
    plain = picture.format == "PPM" and picture.tile[0][0] in ("ppm", "ppm_plain")
    if plain and picture.width * picture.height > TEXT_LIMIT:
        raise Image.DecompressionBombError(
            f"{picture.width}×{picture.height} pixels are too many for this kind of PPM: save it as PNG"
        )
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        tile = [picture.tag_v2.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)]
        if tile[0] * tile[1] > TILE_LIMIT:
            raise Image.DecompressionBombError(f"tiles of {tile[0]}×{tile[1]} pixels are too large")
    return picture


def _draft(picture: Image.Image, size: int) -> tuple[float, float] | None:
    """Have a large JPEG decoded smaller. Returns how much of the draft, in its pixels, is picture and not padding.

    Decoding pads a draft to whole pixels. Resized with its padding it would be off by up to half a pixel of the result
    at the far edges, which costs more than the draft itself.
    """
    enough = DRAFT_MARGIN * size
    if picture.format not in ("JPEG", "MPO") or min(picture.size) < 2 * enough:
        return None
    scale = next(scale for scale in (8, 4, 2) if min(picture.size) >= scale * enough)
    drafted = picture.draft(None, (picture.width // scale, picture.height // scale))
    return drafted[1][2:] if drafted else None


def _load(data: bytes, size: int | None) -> tuple[Image.Image, tuple[float, float]]:
    """Decode all pixels, or a draft for `size`. Returns how much of it is picture and not padding too.

    A file that breaks off raises, whatever another library made of Pillow's switch for it.
    """
    layout = jpeg.Layout()
    if data.startswith(b"\xff\xd8"):
        layout = jpeg.read_layout(data)
        if (shorter := jpeg.drop_hostile_segments(data, layout)) is not data:
            data, layout = shorter, jpeg.read_layout(shorter)
    elif data.startswith(png.MAGIC):
        data = png.keep_pixels(data)
    elif data.startswith(TIFFS) and not tiff.is_bounded(data):
        raise ValueError("its directory is larger than the file")
    picture = _open(data)
    extent = (_draft(picture, size) if size else None) or picture.size
    if layout.waits:
        jpeg.load(picture, layout, data, lambda: _open(data))
    elif layout.frame and not layout.followed:
        raise ValueError(jpeg.BREAKS_OFF)
    with _strictly():
        picture.load()
    return picture, extent


_switching = threading.Lock()


@contextmanager
def _strictly() -> Iterator[None]:
    """Broken-off files raise, even where someone has set Pillow's LOAD_TRUNCATED_IMAGES."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    with _switching:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation, of a picture that is decoded: some formats keep it behind the pixels."""
    try:
        if not tiff.is_bounded(picture.info.get("exif", b"").removeprefix(b"Exif\0\0")):
            return 1
        return picture.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF is no reason to lose a good picture
        return 1


@contextmanager
def _blame(name: str) -> Iterator[None]:
    """Raise whatever goes wrong as a RowError that names the picture."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise RowError(f"{name}: {error}", "picture too large") from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        reason = " ".join((str(error) or repr(error)).split())
        raise RowError(f"{name}: the picture cannot be decoded ({reason:.200})", "picture broken") from None


def _describe(data: bytes) -> str:
    """What a file is that is no picture, by its first bytes."""
    head = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not data:
        return "an empty file"
    if not data.strip(b"\0"):
        return "only zero bytes: an interrupted download"
    if head[4:8] == b"ftyp":
        kind = BRANDS.get(head[8:11], "a video, or another kind of media file")
        return f"{kind}: save it as JPEG"
    for beginning, meaning in STRANGERS.items():
        if head.startswith(beginning):
            return meaning
    return f"not a picture, or damaged at its start; supported formats: {', '.join(_formats())}"


# --- to pixels --------------------------------------------------------------------------------------------------------


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """The picture as RGB or, where it is grey, as L, which takes a quarter of the memory."""
    if picture.mode in ("RGB", "L"):
        return picture  # convert() would copy it
    if picture.mode.startswith("I") or picture.mode == "F":
        return _scale_levels(picture)
    return picture.convert("L" if picture.mode == "1" else "RGB")


def _scale_levels(picture: Image.Image) -> Image.Image:
    """16 bits and more, and floats. What is below 0, and what is no number, is black."""
    rows = max(1, 2**20 // picture.width)  # at a time: as numbers they take many times the picture's memory
    strips = [(0, top, picture.width, min(top + rows, picture.height)) for top in range(0, picture.height, rows)]
    ranges = [_finite_range(_levels(picture, strip)) for strip in strips]
    top = _top(picture.mode, min(low for low, _ in ranges), max(high for _, high in ranges))
    scaled = np.empty((picture.height, picture.width), np.uint8)
    for strip in strips:
        scaled[strip[1] : strip[3]] = (np.nan_to_num(_levels(picture, strip)).clip(0, top) / top * 255).round()
    return Image.fromarray(scaled)


def _top(mode: str, lowest: float, highest: float) -> float:
    """The level that is white, of the usual ones the first that no level of the picture exceeds."""
    if mode == "F" and highest <= 1:
        return 1
    if mode == "I" and lowest < 0 and 255 < highest <= 32767:
        return 32767
    return next((top for top in (255, 65535) if highest <= top), highest)


def _finite_range(levels: np.ndarray) -> tuple[float, float]:
    finite = np.isfinite(levels)
    return levels.min(where=finite, initial=0), levels.max(where=finite, initial=0)


def _levels(picture: Image.Image, strip: tuple[int, int, int, int]) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a float may be a signalling NaN
        return np.asarray(picture.crop(strip)).astype(np.float64)


def _turn(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def _shrink(picture: Image.Image, size: int, extent: tuple[float, float]) -> Image.Image:
    """Bring the short side to `size`. `extent` is how far the picture reaches, in its own pixels."""
    width, height = extent
    short = min(width, height)
    if short == size:
        return picture
    wide, high = int(size * width / short), int(size * height / short)
    if wide * high <= PIXEL_LIMIT:
        return picture.resize((wide, high), Image.Resampling.BICUBIC, (0, 0, width, height))
    # A thread of a picture: nothing is made that the crop throws away.
    left, top = ((wide - size) // 2) * width / wide, ((high - size) // 2) * height / high
    box = (left, top, left + size * width / wide, top + size * height / high)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box)


def _crop(picture: Image.Image, size: int) -> np.ndarray:
    """The square in the middle: uint8 [3, size, size], not yet in that order in memory: its batch has it so."""
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    square = picture.crop((left, top, left + size, top + size)).convert("RGB")
    return np.asarray(square).transpose(2, 0, 1)
