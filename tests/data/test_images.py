"""Bytes to pixels: modes, orientations, CLIP's own preprocessing as the measure, and files that are no pictures."""

from __future__ import annotations

import io
import random
import struct
import time

import numpy as np
import pytest
from PIL import Image, features

from minimind_v.core.data import images
from minimind_v.core.data.images import blank_pixels, decode, load_pixels, to_pixels
from minimind_v.core.errors import RowError
from tests.data.made import png_header

SIZE = 224


def encoded(picture, kind, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, seed=0) -> Image.Image:
    """The hardest picture for a resize: every pixel its own."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width, height) -> Image.Image:
    """Something like a photograph: a coarse pattern, blown up."""
    return noise(8, 6, seed=1).resize((width, height), Image.Resampling.BICUBIC)


def refused(data, name="broken.jpg") -> RowError:
    with pytest.raises(RowError) as caught:
        load_pixels(data, name, SIZE)
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)
    return caught.value


# --- as CLIP sees it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    """transformers' own preprocessing, stopped before it normalises: uint8 [3, 224, 224]."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    return lambda picture: np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize(
    ("width", "height"),
    [
        *(
            (224, 224),
            (1, 1),
            (2, 3),
            (100, 100),
            (448, 448),
            (640, 480),
            (480, 640),
            (500, 333),
            (333, 500),
            (1280, 720),
        ),
        *((224, 225), (225, 224), (223, 300), (300, 224), (224, 1000), (300, 1), (1, 300), (30, 900), (899, 31)),
    ],
)
def test_pixels_are_those_of_clips_own_preprocessing(clip, width, height):
    picture = noise(width, height)
    found = to_pixels(picture, SIZE)
    assert found.shape == (3, SIZE, SIZE)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - clip(picture).astype(int)).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(1, 1000), (1000, 1)])
def test_lines_of_pixels(width, height):
    ramp = np.linspace(0, 250, 1000).reshape(height, width).round().astype(np.uint8)
    found = to_pixels(Image.fromarray(ramp).convert("RGB"), SIZE)
    assert found.shape == (3, SIZE, SIZE)
    assert np.abs(found.astype(int) - 125).max() <= 1, "the middle pixel fills the picture"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK", "YCbCr"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_modes_come_out_as_clips_own_preprocessing_has_them(clip, mode, kind):
    picture = smooth(90, 60).convert(mode)
    try:
        data = encoded(picture, kind)
    except OSError:
        pytest.skip(f"no {kind} holds {mode}")
    found = load_pixels(data, "picture", SIZE)
    expected = clip(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert found.std() > 5, "the picture is still there"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF"])
def test_formats(kind):
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    picture = smooth(300, 200)
    found = load_pixels(encoded(picture, kind), "picture", SIZE)
    difference = np.abs(found.astype(int) - to_pixels(picture, SIZE).astype(int))
    assert difference.mean() < (0.01 if kind in ("PNG", "BMP", "TIFF", "PPM") else 12)


def test_the_first_frame_of_a_moving_picture_is_shown():
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "TIFF"):
        found = load_pixels(encoded(red, kind, save_all=True, append_images=[blue]), "moving", SIZE)
        assert found[:, 100, 100].tolist() == [255, 0, 0]


def test_palette_with_transparency():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 200, 100, 50])
    for transparency in (0, bytes([255, 128])):
        found = load_pixels(encoded(picture, "PNG", transparency=transparency), "clear", SIZE)
        assert (found.reshape(3, -1).T == [200, 100, 50]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)
    found = load_pixels(encoded(Image.fromarray(ramp), kind), "deep", SIZE)
    expected = ramp / 257
    assert (np.abs(found - expected) <= 0.5 + 1e-9).all()
    assert found.min() == 0
    assert found.max() == 255


@pytest.mark.parametrize("mode", ["I", "F"])
def test_wide_modes(mode):
    levels = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 256
    narrow = Image.fromarray(levels.astype(np.int32 if mode == "I" else np.float32))
    assert (load_pixels(encoded(narrow, "TIFF"), "wide", SIZE) == levels).all(), "eight bits stay eight bits"
    wide = Image.fromarray((levels * 257 - 40).astype(np.int32 if mode == "I" else np.float32))
    found = load_pixels(encoded(wide, "TIFF"), "wide", SIZE)
    assert np.abs(found.astype(int) - levels).max() <= 1
    assert found.min() == 0


def test_numbers_that_are_none_are_black():
    levels = np.full((8, 8), np.nan, np.float32)
    levels[:, 4:] = np.inf
    assert load_pixels(encoded(Image.fromarray(levels), "TIFF"), "nan", SIZE).shape == (3, SIZE, SIZE)


# --- upright ----------------------------------------------------------------------------------------------------------

FROM_UPRIGHT = {  # how a picture lies in its file that EXIF's orientation brings upright again (EXIF 2.3, tag 0x0112)
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, kind):
    upright = np.zeros((40, 60, 3), np.uint8)  # four quarters of which no two turns look the same
    upright[:20, :30], upright[:20, 30:], upright[20:, :30] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(FROM_UPRIGHT[orientation](upright)))
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    picture = decode(encoded(stored, kind, exif=exif, **options), "turned")
    assert picture.size == (60, 40)
    assert np.abs(np.asarray(picture).astype(int) - upright.astype(int)).max() <= 8


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_does_not_exist_changes_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encoded(smooth(60, 40), "JPEG", exif=exif), "odd").size == (60, 40)


# --- broken -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        bytes(1000),
        random.Random(0).randbytes(5000),
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        b"GIF89a",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\x00\x00\x00\x00WEBPVP8 ",
        b"P6 0 5 255\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_picture_is_refused(data):
    assert refused(data).kind == "picture broken"


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_breaks_off_is_refused_wherever(progressive):
    data = encoded(noise(120, 80), "JPEG", quality=80, progressive=progressive)
    for length in [*range(0, 640, 7), *range(640, len(data) - 40, 131), *range(len(data) - 40, len(data) - 2)]:
        assert refused(data[:length]).kind == "picture broken", length
    load_pixels(data, "whole", SIZE)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_half_a_file_is_refused(kind):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WEBP")
    data = encoded(noise(120, 80), kind)
    for share in (0.1, 0.5, 0.9):
        assert refused(data[: int(len(data) * share)]).kind == "picture broken"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM"])
def test_damage_gives_a_picture_or_a_row_error_and_nothing_else(kind):
    rng = random.Random(kind)
    whole = encoded(smooth(60, 40), kind)
    refusals = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(32, len(data))] = rng.randrange(256)
        try:
            assert load_pixels(bytes(data), "damaged", SIZE).shape == (3, SIZE, SIZE)
        except RowError:
            refusals += 1
    assert refusals < 60 or kind == "PNG", "only a PNG's check sums notice everything"


@pytest.mark.parametrize(
    ("width", "height"), [(10_001, 10_000), (13_000, 13_000), (65_535, 65_535), (2**31 - 1, 2**31 - 1)]
)
def test_a_decompression_bomb_is_refused_by_its_header(width, height):
    begun = time.perf_counter()
    assert refused(png_header(width, height)).kind == "picture too large"
    assert refused(b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(3) + b",").kind.startswith("picture")
    assert time.perf_counter() - begun < 3


def test_postscript_is_never_run(monkeypatch):
    from PIL import EpsImagePlugin

    def run(*_args, **_options):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert "PostScript" in str(refused(program, "drawing.jpg"))


@pytest.mark.parametrize(("width", "height"), [(1, 5000), (5000, 1), (2, 60_000)])
def test_a_thread_of_a_picture_takes_no_gigabytes(monkeypatch, width, height):
    asked = []
    resize = Image.Image.resize

    def spy(picture, size, *args, **options):
        asked.append(size[0] * size[1])
        assert asked[-1] <= images.PIXEL_LIMIT, "a picture of several gigabytes is on its way"
        return resize(picture, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    ramp = (
        np.linspace(0, 250, max(width, height))
        .round()
        .astype(np.uint8)
        .reshape((height, -1) if height > 2 else (1, -1))
    )
    picture = Image.fromarray(np.broadcast_to(ramp, (height, width)).copy()).convert("RGB")
    found = to_pixels(picture, SIZE)
    assert asked
    assert found.shape == (3, SIZE, SIZE)
    assert np.abs(found.astype(int) - 125).max() <= 2, "its middle"


def test_the_way_of_threads_shows_what_the_usual_way_shows(monkeypatch):
    for size in ((40, 900), (900, 40), (300, 500)):
        picture = smooth(*size)
        usual = to_pixels(picture, SIZE).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(images, "PIXEL_LIMIT", 0)
            difference = np.abs(to_pixels(picture, SIZE).astype(int) - usual)
        assert difference.max() <= 2
        assert difference.mean() < 0.1


def test_the_blank_picture_is_grey():
    assert (blank_pixels(32) == 128).all()
    assert blank_pixels(32).shape == (3, 32, 32)
    assert blank_pixels(32).dtype == np.uint8
