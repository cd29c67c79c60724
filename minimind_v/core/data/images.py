"""Decode a picture file and preprocess it for the vision encoder, as published; the pixels stay uint8 until the model.

Two things differ from the published code on purpose: images are turned upright by their EXIF orientation, and 16 bits
and floats are scaled to 8 bits, where Pillow's `convert` would clip them. All else is equal to one grey level, except
that large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size ("draft"), see `DRAFT_MARGIN`.
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

PIXEL_LIMIT = 100_000_000  # pixels of one image; a few kilobytes can unpack to gigabytes
HUNGRY = {
    "WEBP": 50_000_000,
    "AVIF": 50_000_000,
}  # decoders that need 16 bytes or more a pixel; others need four to nine
SIDE_LIMIT = 2**20  # pixels of a side: each row of pixels takes memory and time of its own
# Bytes within which the pixels of a PPM or GIF must begin: Pillow reads comments before them byte by byte.
HEADER_LIMIT = 2**20
LONG_HEADERS = (b"GIF8", *(b"P" + kind for kind in (b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"f", b"y")))
TILE_LIMIT = 4096**2  # pixels of a TIFF's tile, which may be larger than the image and is unpacked whole
TEXT_LIMIT = 2_000_000  # pixels of a PPM that is text or has unusual levels: Pillow reads it in Python
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF")  # no programs, no drawings, no guesses

# The short side of a draft is at least so many times the model's. Measured against decoding at full size, in grey
# levels of 255 in CLIP's 224² pixels, over images with a natural (1/f) spectrum, edges and text
# (`python -m benchmarks.pictures`):
#   short side of the draft   2.1 × 224   2.7 ×   3.3 ×
#   mean difference                 1.1     0.7     0.4
#   largest                          21      14       7
DRAFT_MARGIN = 2
DARK = 80  # the highest dark level
SAMPLE = 512  # pixels of a side are enough to measure how dark an image is
# Stored features are valid for one rendering. A change of the code that changes pixels must change the first number.
RENDERING = f"2, margin {DRAFT_MARGIN}, Pillow {Image.__version__}"

TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TURNS = {  # EXIF orientation (tag 0x0112) → the transposition that turns the image upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
STRANGERS = {  # first bytes of other files that were saved as picture files
    b"<!doctype html": "an HTML page: the web page of an image was saved instead of the image",
    b"<html": "an HTML page: the web page of an image was saved instead of the image",
    b"version https://git-lfs": "a git-lfs pointer, not the image: run `git lfs pull` in its repository",
    b"<svg": "an SVG drawing: save it as PNG",
    b"<?xml": "XML, perhaps an SVG drawing: save it as PNG",
    b"%!ps": "PostScript, a program and not an image: save it as PNG",
    b"%pdf": "a PDF document: save its page as PNG",
    b"8bps": "a Photoshop file: save it as PNG",
    b"pk\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"{": "JSON text: perhaps a server's error message was saved instead of the image",
}
BRANDS = {b"hei": "HEIC", b"hev": "HEIC", b"mif": "HEIF", b"msf": "HEIF"}  # in an ISO media file, behind `ftyp`

# Without these lines Pillow's warnings about readable files would appear in the terminal, from every data worker.
# `warnings.catch_warnings` around every decoding would not be safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode(data: bytes, name: str) -> Image.Image:
    """Decode a picture file at its full size: upright, RGB. Raises RowError with `name`."""
    with _row_errors(name):
        image = _load(data, None)[0]
        return _turn(_to_eight_bits(image), _orientation(image)).convert("RGB")


def load_pixels(data: bytes, name: str, size: int, resize_mode: str = "crop", resample: str = "bicubic") -> np.ndarray:
    """Decode and prepare a picture file: uint8 [3, size, size]. Raises RowError with `name`.

    resize_mode: `crop` keeps the middle of the longer side; `squeeze` keeps the whole image and changes its aspect.
    resample: a filter of Pillow by its name, as vision specs have it.
    """
    with _row_errors(name):
        return _prepare(*_load(data, size), size, resize_mode, resample)


def is_dark_on_transparent(data: bytes) -> bool:
    """Whether an image is dark on a transparent background that becomes dark without the alpha channel.

    Training drops alpha, as the published conversion does, and such a drawing becomes black on black.
    """
    if data.startswith(b"\xff\xd8"):
        return False
    with suppress(Exception):
        image = _open(png.keep_pixels(data) if data.startswith(png.MAGIC) else data)
        if image.mode.startswith("I") or not image.has_transparency_data:
            return False
        image = _load(data, None)[0]
        image.thumbnail((SAMPLE, SAMPLE), Image.Resampling.NEAREST)  # it mixes no colours
        levels = np.asarray(image.convert("RGBA"))
        light, shown = levels[..., :3].max(2) > DARK, levels[..., 3] >= 128
        return all(pixels.mean() >= 0.01 and light[pixels].mean() < 0.1 for pixels in (shown, ~shown))
    return False


def to_pixels(
    image: Image.Image, size: int, resize_mode: str = "crop", resample: str = "bicubic", name: str = "the image"
) -> np.ndarray:
    """Prepare a decoded image as `load_pixels` does. Raises RowError with `name`."""
    with _row_errors(name):
        if not all(image.size):
            raise ValueError(f"it has {image.width}×{image.height} pixels")
        return _prepare(image, image.size, size, resize_mode, resample)


def _prepare(image: Image.Image, extent: tuple[float, float], size: int, resize_mode: str, resample: str) -> np.ndarray:
    """Resize to uint8 [3, size, size]: CLIPImageProcessor's resize and centre crop, or SiglipImageProcessor's squeeze.

    The vision encoder normalises, so that workers send a quarter of the bytes.
    """
    eight_bits, method = _to_eight_bits(image), Image.Resampling[resample.upper()]
    if resize_mode == "squeeze":
        small = eight_bits.resize((size, size), method, (0, 0, *extent))
    else:
        small = _shrink(eight_bits, size, extent, method)
    return _crop(_turn(small, _orientation(image)), size)


def blank_pixels(size: int) -> np.ndarray:
    """A blank image: mid-grey, uint8 [3, size, size]."""
    return np.full((3, size, size), 128, dtype=np.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    """The PNG file of an image, uint8 [3, H, W]."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG")
    return file.getvalue()


# --- from bytes -------------------------------------------------------------------------------------------------------


@cache
def _formats() -> list[str]:
    """The formats that this Pillow can read: old versions have no AVIF."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _open(data: bytes) -> Image.Image:
    """Read the header. Raises an error for an image that would take too much memory or time."""
    if len(data) > HEADER_LIMIT and data.startswith(LONG_HEADERS):
        try:
            Image.open(io.BytesIO(data[:HEADER_LIMIT]), formats=("PPM", "GIF"))
        except Exception:
            raise ValueError(f"no image starts in its first {HEADER_LIMIT:,} bytes") from None
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        raise ValueError(_describe(data)) from None
    if image.width * image.height > min(PIXEL_LIMIT, HUNGRY.get(image.format or "", PIXEL_LIMIT)):
        raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels are too many")
    if max(image.size) > SIDE_LIMIT:
        raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels: a side is too long")
    plain = image.format == "PPM" and image.tile[0][0] in ("ppm", "ppm_plain")
    if plain and image.width * image.height > TEXT_LIMIT:
        raise Image.DecompressionBombError(
            f"{image.width}×{image.height} pixels are too many for this kind of PPM: save it as PNG"
        )
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tile = [image.tag_v2.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)]
        if tile[0] * tile[1] > TILE_LIMIT:
            raise Image.DecompressionBombError(f"tiles of {tile[0]}×{tile[1]} pixels are too large")
    return image


def _draft(image: Image.Image, size: int) -> tuple[float, float] | None:
    """Set a large JPEG to decode smaller. Returns the size of the draft without padding, in its pixels.

    Decoding pads a draft to whole pixels. Resized with its padding, the image would be off by up to half a pixel at the
    far edges: a larger error than that of the draft.
    """
    enough = DRAFT_MARGIN * size
    if image.format not in ("JPEG", "MPO") or min(image.size) < 2 * enough:
        return None
    scale = next(scale for scale in (8, 4, 2) if min(image.size) >= scale * enough)
    drafted = image.draft(None, (image.width // scale, image.height // scale))
    return drafted[1][2:] if drafted else None


def _load(data: bytes, size: int | None) -> tuple[Image.Image, tuple[float, float]]:
    """Decode all pixels, or a draft for `size`. Returns the image and its size without padding.

    A truncated file raises an error, whatever another library has set in Pillow.
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
    image = _open(data)
    extent = (_draft(image, size) if size else None) or image.size
    if layout.waits:
        jpeg.load(image, layout, data, lambda: _open(data))
    elif layout.frame and not layout.followed:
        raise ValueError(jpeg.BREAKS_OFF)
    with _strictly():
        image.load()
    return image, extent


_switching = threading.Lock()


@contextmanager
def _strictly() -> Iterator[None]:
    """Truncated files raise an error, even if Pillow's LOAD_TRUNCATED_IMAGES is set."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    with _switching:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a decoded image: some formats keep it behind the pixels."""
    try:
        if not tiff.is_bounded(image.info.get("exif", b"").removeprefix(b"Exif\0\0")):
            return 1
        return image.getexif().get(0x0112, 1)
    except Exception:  # a good image may have broken EXIF
        return 1


@contextmanager
def _row_errors(name: str) -> Iterator[None]:
    """Raise every error as a RowError with the picture file's name."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise RowError(f"{name}: {error}", "image too large") from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        reason = " ".join((str(error) or repr(error)).split())
        raise RowError(f"{name}: the image cannot be decoded ({reason:.200})", "image broken") from None


def _describe(data: bytes) -> str:
    """What a file that is no picture is, by its first bytes."""
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
    return f"not an image, or damaged at its start; supported formats: {', '.join(_formats())}"


# --- to pixels --------------------------------------------------------------------------------------------------------


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """The image as RGB, or as L if it is grey."""
    if image.mode in ("RGB", "L"):
        return image  # convert() would copy it
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_levels(image)
    return image.convert("L" if image.mode == "1" else "RGB")


def _scale_levels(image: Image.Image) -> Image.Image:
    """Scale 16 bits and more, and floats. Negative levels and NaN become black."""
    rows = max(1, 2**20 // image.width)  # at a time: as floats they take many times the image's memory
    strips = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    ranges = [_finite_range(_levels(image, strip)) for strip in strips]
    top = _top(image.mode, min(low for low, _ in ranges), max(high for _, high in ranges))
    scaled = np.empty((image.height, image.width), np.uint8)
    for strip in strips:
        scaled[strip[1] : strip[3]] = (np.nan_to_num(_levels(image, strip)).clip(0, top) / top * 255).round()
    return Image.fromarray(scaled)


def _top(mode: str, lowest: float, highest: float) -> float:
    """The level of white: the first usual one that no level of the image exceeds."""
    if mode == "F" and highest <= 1:
        return 1
    if mode == "I" and lowest < 0 and 255 < highest <= 32767:
        return 32767
    return next((top for top in (255, 65535) if highest <= top), highest)


def _finite_range(levels: np.ndarray) -> tuple[float, float]:
    finite = np.isfinite(levels)
    return levels.min(where=finite, initial=0), levels.max(where=finite, initial=0)


def _levels(image: Image.Image, strip: tuple[int, int, int, int]) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a float may be a signalling NaN
        return np.asarray(image.crop(strip)).astype(np.float64)


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _shrink(image: Image.Image, size: int, extent: tuple[float, float], method: Image.Resampling) -> Image.Image:
    """Resize the short side to `size`. `extent` is the image's size without padding, in its pixels."""
    width, height = extent
    short = min(width, height)
    if short == size:
        return image
    wide, high = int(size * width / short), int(size * height / short)
    if wide * high <= PIXEL_LIMIT:
        return image.resize((wide, high), method, (0, 0, width, height))
    # A very long image: resize only the part that the crop keeps.
    left, top = ((wide - size) // 2) * width / wide, ((high - size) // 2) * height / high
    box = (left, top, left + size * width / wide, top + size * height / high)
    return image.resize((size, size), method, box)


def _crop(image: Image.Image, size: int) -> np.ndarray:
    """The square in the middle: uint8 [3, size, size], a view of [size, size, 3] that the batch copies."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    square = image.crop((left, top, left + size, top + size)).convert("RGB")
    return np.asarray(square).transpose(2, 0, 1)
