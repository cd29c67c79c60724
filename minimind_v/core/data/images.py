"""From the bytes of a picture to what CLIP is shown: the published preprocessing, kept as uint8 until the model."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from minimind_v.core.errors import RowError

PIXEL_LIMIT = 100_000_000  # pixels of one picture; a few kilobytes can unpack to gigabytes


def decode(data: bytes | Any, name: str) -> Image.Image:
    """Decode bytes (or an open binary file) to an upright RGB picture. Raises RowError naming `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
            if picture.width * picture.height > PIXEL_LIMIT:
                raise RowError(f"{name}: {picture.width}×{picture.height} pixels are too many", "picture too large")
            if picture.format == "EPS":  # a program, which Pillow would have Ghostscript run
                raise RowError(f"{name}: PostScript, not a picture", "picture broken")
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError(f"{name}: {error}", "picture too large") from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        reason = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else str(error) or repr(error)
        raise RowError(f"{name}: the picture cannot be decoded ({reason})", "picture broken") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits and more: convert() would clip, not scale
        levels = np.asarray(picture, dtype=np.float64)
        top = 65535.0 if levels.max(initial=0) > 255 else 255.0
        picture = Image.fromarray((levels.clip(0, top) / top * 255).round().astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def to_pixels(picture: Image.Image, size: int) -> np.ndarray:
    """Resize the short side to `size` (bicubic) and crop the centre: uint8 [3, size, size], as CLIPImageProcessor does.

    Normalising is the vision model's business: four times fewer bytes travel from the data workers.
    """
    width, height = picture.size
    short = min(width, height)
    resized = (int(size * width / short), int(size * height / short)) if short != size else (width, height)
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
    crop = (left, top, left + size, top + size)
    if resized[0] * resized[1] > PIXEL_LIMIT:  # a thread of a picture: nothing is made that the crop throws away
        wide, high = width / resized[0], height / resized[1]
        box = (crop[0] * wide, crop[1] * high, crop[2] * wide, crop[3] * high)
        picture = picture.resize((size, size), Image.Resampling.BICUBIC, box)
    else:
        picture = picture.resize(resized, Image.Resampling.BICUBIC) if resized != picture.size else picture
        picture = picture.crop(crop)
    return np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1).copy()  # [3, size, size]


def load_pixels(data: bytes, name: str, size: int) -> np.ndarray:
    """Decode and prepare a picture: uint8 [3, size, size]."""
    return to_pixels(decode(data, name), size)


def blank_pixels(size: int) -> np.ndarray:
    """A picture that shows nothing: mid-grey, uint8 [3, size, size]."""
    return np.full((3, size, size), 128, dtype=np.uint8)
