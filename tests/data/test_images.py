"""Bytes to pixels: modes, orientations, CLIP's own preprocessing as the measure, and files that are no pictures."""

from __future__ import annotations

import io
import random
import struct
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from minimind_v.core.data import images
from minimind_v.core.data.images import blank_pixels, decode, load_pixels, to_pixels
from minimind_v.core.errors import RowError
from tests.rows.made import png_header

SIZE = 224
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL", "ignore::DeprecationWarning:PIL"
)  # pytest undoes ours


def encoded(picture, kind, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes, wrong: int = 0) -> bytes:
    """A chunk of a PNG, its check sum wrong where asked for."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)


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
    pixels = to_pixels(picture, SIZE)
    assert pixels.shape == (3, SIZE, SIZE)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - clip(picture).astype(int)).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(1, 1000), (1000, 1)])
def test_lines_of_pixels(width, height):
    ramp = np.linspace(0, 250, 1000).reshape(height, width).round().astype(np.uint8)
    pixels = to_pixels(Image.fromarray(ramp).convert("RGB"), SIZE)
    assert pixels.shape == (3, SIZE, SIZE)
    assert np.abs(pixels.astype(int) - 125).max() <= 1, "the middle pixel fills the picture"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK", "YCbCr"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_modes_come_out_as_clips_own_preprocessing_has_them(clip, mode, kind):
    picture = smooth(90, 60).convert(mode)
    try:
        data = encoded(picture, kind)
    except OSError:
        pytest.skip(f"no {kind} holds {mode}")
    pixels = load_pixels(data, "picture", SIZE)
    expected = clip(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1
    assert pixels.std() > 5, "the picture is still there"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF"])
def test_formats(kind):
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    picture = smooth(300, 200)
    pixels = load_pixels(encoded(picture, kind), "picture", SIZE)
    difference = np.abs(pixels.astype(int) - to_pixels(picture, SIZE).astype(int))
    assert difference.mean() < (0.01 if kind in ("PNG", "BMP", "TIFF", "PPM") else 12)


def test_the_first_frame_of_a_moving_picture_is_shown():
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "TIFF"):
        pixels = load_pixels(encoded(red, kind, save_all=True, append_images=[blue]), "moving", SIZE)
        assert pixels[:, 100, 100].tolist() == [255, 0, 0]


def test_palette_with_transparency():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 200, 100, 50])
    for transparency in (0, bytes([255, 128])):
        pixels = load_pixels(encoded(picture, "PNG", transparency=transparency), "clear", SIZE)
        assert (pixels.reshape(3, -1).T == [200, 100, 50]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)
    pixels = load_pixels(encoded(Image.fromarray(ramp), kind), "deep", SIZE)
    expected = ramp / 257
    assert (np.abs(pixels - expected) <= 0.5 + 1e-9).all()
    assert pixels.min() == 0
    assert pixels.max() == 255


@pytest.mark.parametrize("mode", ["I", "F"])
def test_wide_modes(mode):
    levels = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 256
    narrow = Image.fromarray(levels.astype(np.int32 if mode == "I" else np.float32))
    assert (load_pixels(encoded(narrow, "TIFF"), "wide", SIZE) == levels).all(), "eight bits stay eight bits"
    wide = Image.fromarray((levels * 257 - 40).astype(np.int32 if mode == "I" else np.float32))
    pixels = load_pixels(encoded(wide, "TIFF"), "wide", SIZE)
    assert np.abs(pixels.astype(int) - levels).max() <= 1
    assert pixels.min() == 0


def test_numbers_that_are_none_are_black():
    levels = np.full((8, 8), np.nan, np.float32)
    levels[:, 4:] = np.inf
    assert load_pixels(encoded(Image.fromarray(levels), "TIFF"), "nan", SIZE).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("mode", ["HSV", "LAB", "PA", "RGBX", "I;16B", "RGBa"])
def test_rare_modes_show_what_they_hold(mode):
    picture = smooth(300, 200)
    if mode == "LAB":
        pixels, expected = load_pixels(encoded(picture.convert("LAB"), "TIFF"), "lab", SIZE), to_pixels(picture, SIZE)
    elif mode == "I;16B":
        levels = np.asarray(picture.convert("L"))
        deep = Image.frombytes("I;16B", picture.size, (levels.astype(">u2") * 257).tobytes())
        pixels, expected = to_pixels(deep, SIZE), to_pixels(picture.convert("L"), SIZE)
    else:
        base = picture.convert({"PA": "P", "RGBa": "RGBA"}.get(mode, "RGB"))
        pixels, expected = to_pixels(base.convert(mode), SIZE), to_pixels(base.convert("RGB"), SIZE)
    assert np.abs(pixels.astype(int) - expected.astype(int)).mean() < (
        1.5 if mode in ("HSV", "LAB") else 0.01
    )  # of few levels


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("width", "height"), [(400, 300), (256, 256), (90, 700), (1, 1), (31, 8)])
def test_squeezed_pixels_are_those_of_siglips_own_preprocessing(width, height, resample):
    transformers = pytest.importorskip("transformers")
    picture = noise(width, height)
    number = Image.Resampling[resample.upper()]
    theirs = transformers.SiglipImageProcessorPil(
        size={"height": 256, "width": 256}, resample=number, do_rescale=False, do_normalize=False
    )(picture, return_tensors="np")["pixel_values"][0]  # [3, S, S]
    ours = to_pixels(picture, 256, "squeeze", resample)
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_a_draft_is_squeezed_to_nearly_the_same_pixels(resample):
    picture = smooth(1900, 1100)
    drafted = load_pixels(encoded(picture, "JPEG", quality=95), "large", 256, "squeeze", resample)
    whole = to_pixels(picture, 256, "squeeze", resample)
    assert np.abs(drafted.astype(int) - whole.astype(int)).mean() <= 1.2


# --- drafts -----------------------------------------------------------------------------------------------------------


def drawn(width, height, seed=0) -> Image.Image:
    """A picture with detail at every scale, hard edges and a slope, so that a shift shows."""
    octaves = [noise(2**n * 4, 2**n * 3, seed + n).resize((width, height), Image.Resampling.BICUBIC) for n in range(7)]
    levels = sum(np.asarray(octave, float) * 0.5**n for n, octave in enumerate(octaves)) / 2
    levels[height // 3 : height // 2, width // 4 : width // 2] = (250, 240, 20)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def exactly(data: bytes, upright=lambda levels: levels) -> np.ndarray:
    """Full decoding and CLIP's preprocessing, written anew with floats where Pillow's resize allows."""
    levels = upright(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    height, width = levels.shape[:2]
    size = (int(SIZE * width / min(width, height)), int(SIZE * height / min(width, height)))
    bands = [Image.fromarray(levels[..., band].astype(np.float32)).resize(size, 3) for band in range(3)]
    left, top = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    cut = [np.asarray(band)[top : top + SIZE, left : left + SIZE] for band in bands]
    return np.stack(cut).clip(0, 255).round().astype(int)


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [
        *((895, 1200, 1), (896, 1200, 2), (1200, 895, 1), (1201, 897, 2), (1787, 1900, 2), (1793, 1801, 4)),
        *((3590, 3600, 8), (500, 333, 1), (2000, 400, 1)),
    ],
)
@pytest.mark.parametrize("progressive", [False, True])
def test_large_jpegs_are_decoded_small_and_look_the_same(monkeypatch, width, height, scale, progressive):
    if progressive and width > 2000:
        pytest.skip("slow, and shown by the others")
    loaded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (loaded.append(self.size), load(self))[1])
    data = encoded(drawn(width, height), "JPEG", quality=90, progressive=progressive)
    loaded.clear()
    pixels = load_pixels(data, "large", SIZE)
    assert loaded[0] == (-(-width // scale), -(-height // scale))
    difference = np.abs(pixels - exactly(data))
    assert difference.max() <= (1 if scale == 1 else 24)
    assert difference.mean() <= (0.4 if scale == 1 else 1.2)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_drafts_of_other_modes(mode):
    data = encoded(drawn(1203, 905).convert(mode), "JPEG", quality=90)
    assert np.abs(load_pixels(data, "large", SIZE) - exactly(data)).mean() <= 1.2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(301, 250), (907, 1205)])
def test_pictures_are_turned_after_they_were_made_small(orientation, width, height):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(drawn(width, height), "JPEG", quality=90, exif=exif)
    pixels = load_pixels(data, "turned", SIZE)
    back = {6: 8, 8: 6}.get(orientation, orientation)  # the others undo themselves
    difference = np.abs(pixels - exactly(data, FROM_UPRIGHT[back]))
    drafted = min(width, height) >= 896
    shifted = (int(SIZE * max(width, height) / min(width, height)) - SIZE) % 2 and orientation not in (1, 5)
    assert difference.mean() <= (1.2 if drafted else 0.4) + (3 if shifted else 0)
    assert shifted or difference.max() <= (24 if drafted else 2)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_draft_of_a_jpeg_that_breaks_off_is_refused(progressive):
    data = encoded(drawn(960, 900), "JPEG", quality=60, progressive=progressive)
    rng = random.Random(7)
    end = len(data) - (3 if progressive else 2)  # the last byte of this progressive file decides no pixel
    for length in [*range(len(data) - 12, end), *(rng.randrange(len(data)) for _ in range(8))]:
        assert refused(data[:length]).kind == "image broken", length
        assert "cut off" in str(refused(data[:length] + bytes(len(data) - length))) or length < 700


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


def test_broken_exif_costs_no_picture():
    for block in (b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(60))):
        assert decode(encoded(smooth(60, 40), "JPEG", exif=block), "odd").size == (60, 40)


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
    assert refused(data).kind == "image broken"


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_breaks_off_is_refused_wherever(progressive):
    data = encoded(noise(120, 80), "JPEG", quality=80, progressive=progressive)
    for length in [*range(0, 640, 7), *range(640, len(data) - 40, 131), *range(len(data) - 40, len(data) - 2)]:
        assert refused(data[:length]).kind == "image broken", length
    load_pixels(data, "whole", SIZE)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_half_a_file_is_refused(kind):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WEBP")
    data = encoded(noise(120, 80), kind)
    for share in (0.1, 0.5, 0.9):
        assert refused(data[: int(len(data) * share)]).kind == "image broken"


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Bytes changed, left out and put in, half of the time in the header; or the end cut off."""
    data = bytearray(whole)
    reach = 200 if rng.random() < 0.5 else len(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(min(reach, len(data)))
        length = rng.choice((0, 1, 1, 1, 4))
        data[at : at + length] = rng.choice(
            (rng.randbytes(length), b"\xff" * length, bytes(length), b"", rng.randbytes(4))
        )
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


@pytest.mark.parametrize(
    "kind", ["JPEG", "large JPEG", "progressive", "PNG", "GIF", "WEBP", "BMP", "TIFF", "LZW", "PPM"]
)
def test_damage_gives_a_picture_or_a_row_error_and_nothing_else(kind):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WEBP")
    rng = random.Random(kind)
    options = {"progressive": {"progressive": True}, "LZW": {"compression": "tiff_lzw"}}.get(kind, {})
    form = {"large JPEG": "JPEG", "progressive": "JPEG", "LZW": "TIFF"}.get(kind, kind)
    whole = encoded(smooth(*((960, 900) if kind == "large JPEG" else (60, 40))), form, **options)
    refusals, one_line, rounds = 0, True, 25 if kind == "large JPEG" else 120
    for _ in range(rounds):
        data = damaged(whole, rng)
        begun = time.perf_counter()
        try:
            assert load_pixels(data, "damaged", SIZE).shape == (3, SIZE, SIZE)
        except RowError as error:
            refusals += 1
            one_line &= "\n" not in str(error)
        assert time.perf_counter() - begun < 20, "a hang"
    assert refusals > 0
    assert one_line
    assert refusals < rounds or kind == "PNG", "only a PNG's check sums notice everything"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (bytes(5000), "only zero bytes"),
        (b"\xef\xbb\xbf\n <!DOCTYPE HTML><html>", "HTML page"),
        (b"<html lang=en>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "video"),
        (b'{"error":"not found"}', "JSON"),
        (b"PK\x03\x04" + bytes(30), "zip"),
        (b"hello", "not an image"),
    ],
    ids=lambda value: repr(value)[:16],
)
def test_what_it_is_instead_of_a_picture_is_said(data, message):
    assert message in str(refused(data))


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO", "PDF", "SGI", "XBM", "IM", "MSP", "PALM"])
def test_only_common_formats_are_read(kind):
    data = encoded(smooth(64, 48).convert({"XBM": "1", "MSP": "1", "PALM": "P"}.get(kind, "RGB")), kind)
    assert refused(data).kind == "image broken"


def test_truncated_files_are_refused_whatever_the_settings_of_pillow(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for kind in ("JPEG", "PNG", "TIFF", "BMP"):
        data = encoded(noise(120, 80), kind)
        assert refused(data[: len(data) * 3 // 4]).kind == "image broken"
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "and it is left as it was"


def test_threads_decode_side_by_side_and_leave_no_trace():
    data = [encoded(noise(130, 90, seed), kind) for seed, kind in enumerate(("JPEG", "PNG", "GIF", "TIFF"))]
    expected, filters, wrong = [load_pixels(content, "one", SIZE) for content in data], list(warnings.filters), []

    def work(number):
        for _ in range(8):
            if not (load_pixels(data[number], "one", SIZE) == expected[number]).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number % 4,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong
    assert warnings.filters == filters


def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_walked():
    whole = bytearray(encoded(smooth(64, 64), "JPEG", progressive=True))
    struct.pack_into(">HH", whole, whole.find(b"\xff\xc2") + 5, 9990, 10_000)
    last = whole.rfind(b"\xff\xda")
    begun = time.process_time()
    assert "scans" in str(refused(bytes(whole[:last] + whole[last:-2] * 1000 + whole[-2:])))
    assert time.process_time() - begun < 1


def test_text_in_a_png_unpacks_to_no_gigabytes(monkeypatch):
    whole = encoded(smooth(8, 8), "PNG")
    packed = zlib.compress(bytes(50_000_000))
    many = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 200
    begun = time.process_time()
    for extra in (chunk(b"zTXt", b"a\0\0" + packed), chunk(b"iCCP", b"a\0\0" + packed), many):
        assert (load_pixels(whole[:33] + extra + whole[33:], "bomb", SIZE) == load_pixels(whole, "plain", SIZE)).all()
    assert time.process_time() - begun < 1, "nothing is unpacked"


def test_a_tiff_with_tiles_larger_than_any_picture_is_refused():
    tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 322: 23_168, 323: 23_168, 324: 300, 325: 2000}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4000)
    assert refused(data).kind == "image too large"


def test_a_webp_that_would_take_gigabytes_is_refused():
    if not features.check("webp"):
        pytest.skip("this Pillow has no WEBP")
    data = encoded(Image.new("RGB", (9000, 6000)), "WEBP", lossless=True, method=0, quality=0)
    assert refused(data).kind == "image too large"


@pytest.mark.parametrize(
    ("width", "height"), [(10_001, 10_000), (13_000, 13_000), (65_535, 65_535), (2**31 - 1, 2**31 - 1)]
)
def test_a_decompression_bomb_is_refused_by_its_header(width, height):
    begun = time.process_time()
    assert refused(png_header(width, height)).kind == "image too large"
    assert refused(b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(3) + b",").kind.startswith("image")
    assert time.process_time() - begun < 3


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
    pixels = to_pixels(picture, SIZE)
    assert asked
    assert pixels.shape == (3, SIZE, SIZE)
    assert np.abs(pixels.astype(int) - 125).max() <= 2, "its middle"


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


# --- JPEGs: whole without an end, broken in spite of one --------------------------------------------------------------

CODINGS = {
    "colour": {},
    "4:4:4": {"subsampling": 0},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "many restarts": {"restart_marker_blocks": 1},
    "progressive": {"progressive": True},
    "progressive restarts": {"progressive": True, "restart_marker_rows": 1},
    "fine": {"quality": 97},
}
END = b"\xff\xd9"


def jpeg_of(mode: str, coding: str, size=(123, 91)) -> bytes:
    return encoded(drawn(*size).convert(mode), "JPEG", **{"quality": 80, **CODINGS[coding]})


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_marker_is_whole(mode, coding):
    data = jpeg_of(mode, coding)
    pixels, body = load_pixels(data, "plain", SIZE), data[: -len(END)]
    assert data.endswith(END)
    for odd in (body, body + b"\xff", body + bytes(300), data + b"ftypmp42" * 50, body + b"\xff\xff" + END):
        assert (load_pixels(odd, "odd", SIZE) == pixels).all()


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_whose_data_is_cut_is_refused_with_an_end_marker_too(mode, coding):
    data = jpeg_of(mode, coding)
    begin, rng = data.find(b"\xff\xda") + 14, random.Random(3)
    cuts = [rng.randrange(begin, len(data) - 20) for _ in range(30)] + [len(data) - lost for lost in range(6, 20)]
    for cut in cuts:
        marked = [END, END + b"more behind it"]
        if "progressive" in coding and len(data) - cut < 20:
            marked = []  # some of these are taken for whole files: they lack a bit of a few last coefficients
        for end in (b"", b"\xff", bytes(len(data) - cut), *marked):
            assert "cut off" in str(refused(data[:cut] + end)), (len(data) - cut, end)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("colour", ["white", "black", "navy", (128, 128, 128)])
def test_flat_pictures_and_flat_bottoms_are_whole(coding, colour):
    flat_bottom = drawn(123, 91)
    flat_bottom.paste(colour, (0, 40, 123, 91))
    for picture in (Image.new("RGB", (100, 75), colour), Image.new("RGB", (1, 1), colour), flat_bottom):
        for mode in ("RGB", "L", "CMYK"):
            data = encoded(picture.convert(mode), "JPEG", **CODINGS[coding])
            assert (np.asarray(decode(data, "flat")) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_a_draft_of_a_jpeg_without_its_end_marker_is_whole():
    data = encoded(drawn(960, 900), "JPEG", quality=60)
    assert (load_pixels(data[:-2], "no end", SIZE) == load_pixels(data, "plain", SIZE)).all()
    assert "cut off" in str(refused(data[:-9] + END))


def test_a_progressive_jpeg_that_lacks_its_last_scans_is_refused():
    data = jpeg_of("RGB", "progressive")
    last = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    assert "scans are missing" in str(refused(data[:last] + END))


@pytest.mark.parametrize("kind", ["baseline", "progressive", "grey"])
def test_scans_of_every_jpeg_are_counted(kind):
    """Baseline with a scan for every component, again and again: three kilobytes took minutes."""
    begun = time.process_time()
    whole = encoded(smooth(64, 64), "JPEG", progressive=kind == "progressive")
    frame = whole.find(b"\xff\xc2" if kind == "progressive" else b"\xff\xc0")
    head = bytearray(whole[: whole.find(b"\xff\xda")])
    struct.pack_into(">HH", head, frame + 5, 9990, 10_000)
    scan = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + b"\x12\x34"
    for count in (300, 50):
        assert "scans" in str(refused(bytes(head) + scan * count + END))
    assert time.process_time() - begun < 1


def test_headers_without_end_are_refused_before_they_are_read():
    whole = encoded(smooth(64, 64), "JPEG")
    begun = time.process_time()
    assert "segments" in str(refused(whole[:2] + b"\xff\xe5\0\2" * 1_000_000 + whole[2:]))
    assert "segments" in str(refused(whole[:2] + bytes(20_000_000) + whole[2:]))
    assert time.process_time() - begun < 2


def test_exif_that_unpacks_to_gigabytes_costs_no_picture():
    whole = encoded(smooth(64, 64), "JPEG")
    fields = b"".join(struct.pack("<HHII", 0x9000 + number, 7, 60_000, 8) for number in range(3000))
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 3000) + fields
    block = b"\xff\xe1" + struct.pack(">H", 65_000) + block.ljust(64_998, b"\0")
    for exif in (block, block[:4] + block[4:].replace(b"II*\0", b"Exif") * 1, block * 40):
        assert (load_pixels(whole[:2] + exif + whole[2:], "exif", SIZE) == load_pixels(whole, "plain", SIZE)).all()


# --- PNGs with more than pixels ---------------------------------------------------------------------------------------


def png_kinds() -> dict[str, bytes]:
    turned, deep = Image.Exif(), np.random.default_rng(0).integers(0, 65536, (40, 60), dtype=np.uint16)
    turned[0x0112] = 6
    frames = [smooth(60, 40), noise(60, 40), noise(60, 40, 1)]
    return {
        "plain": encoded(noise(60, 40), "PNG"),
        "turned": encoded(noise(60, 40), "PNG", exif=turned),
        "palette": encoded(noise(60, 40).convert("P"), "PNG", transparency=3),
        "alpha": encoded(noise(60, 40).convert("RGBA"), "PNG"),
        "deep": encoded(Image.fromarray(deep), "PNG"),
        "bits": encoded(noise(60, 40).convert("1"), "PNG"),
        "moving": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "cover": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True),
    }


@pytest.mark.parametrize("kind", png_kinds())
def test_chunks_that_decide_no_pixel_change_none(kind):
    whole = png_kinds()[kind]
    pixels, packed = load_pixels(whole, "plain", SIZE), zlib.compress(bytes(2_000_000))
    extras = [
        chunk(b"iCCP", b"profile\0\0" + packed),
        chunk(b"zTXt", b"text\0\0" + packed),
        chunk(b"iTXt", b"text\0\1\0\0\0" + packed),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + packed),
        chunk(b"tEXt", b"text\0" + bytes(2_000_000)),
        chunk(b"iCCP", b"broken"),
        chunk(b"tEXt", b"a\0b", wrong=1),
        chunk(b"prIv", b"?" * 1000),
    ]
    for extra in extras:
        for position in (33, whole.find(b"IDAT") - 4, whole.find(b"IEND") - 4):
            odd = whole[:position] + extra + whole[position:]
            assert (load_pixels(odd, "odd", SIZE) == pixels).all(), (extra[4:8], position)
    for odd in (whole[:-12], whole[:-5], whole + b"behind it" * 99, whole[:-12] + extras[0][:500]):
        assert (load_pixels(odd, "odd", SIZE) == pixels).all()


def test_the_orientation_of_a_png_is_kept_wherever_it_stands():
    whole, turned = encoded(noise(60, 40), "PNG"), Image.Exif()
    turned[0x0112] = 6
    text = chunk(b"tEXt", b"text\0" + b"x" * 100)
    for extra in (
        chunk(b"eXIf", turned.tobytes()[6:]),
        chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n20\n" + turned.tobytes().hex().encode())),
    ):
        for position in (33, len(whole) - 12):
            assert decode(whole[:position] + text + extra + whole[position:], "turned").size == (40, 60)


def test_text_between_the_pixels_of_a_png_is_passed_over():
    whole = encoded(noise(60, 40), "PNG")
    begin, end = whole.find(b"IDAT") + 4, whole.find(b"IEND") - 8
    pieces = [chunk(b"IDAT", whole[at : min(at + 900, end)]) for at in range(begin, end, 900)]
    assert len(pieces) > 2
    odd = whole[: begin - 8] + chunk(b"tEXt", b"a\0b").join(pieces) + whole[-12:]
    assert (load_pixels(odd, "odd", SIZE) == load_pixels(whole, "plain", SIZE)).all()


def test_a_png_of_a_million_chunks_is_refused():
    whole, begun = encoded(noise(60, 40), "PNG"), time.process_time()
    assert "chunks" in str(refused(whole[:33] + chunk(b"IDAT", b"") * 1_000_000 + whole[33:]))
    assert time.process_time() - begun < 2


# --- other files that take more than they are -------------------------------------------------------------------------


def tiff_of(fields: dict[int, tuple[int, int, int]], behind: int) -> bytes:
    whole = {256: (4, 1, 10), 257: (4, 1, 10), 258: (4, 1, 8), 259: (4, 1, 1), 262: (4, 1, 1), 273: (4, 1, 8)}
    entries = [struct.pack("<HHII", tag, *values) for tag, values in sorted((whole | fields).items())]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(behind)


def test_a_tiff_whose_fields_are_larger_than_it_is_refused():
    overlapping = {0x8000 + number: (7, 900_000, 8) for number in range(2000)}
    strips = {257: (4, 1, 500_000), 278: (4, 1, 1), 273: (4, 500_000, 200), 279: (4, 500_000, 200)}
    begun = time.process_time()
    for data in (tiff_of(overlapping, 1_000_000), tiff_of(strips, 4_000_000)):
        assert "directory is larger than the file" in str(refused(data))
    assert load_pixels(tiff_of({}, 500), "small", SIZE).shape == (3, SIZE, SIZE)
    assert time.process_time() - begun < 1


def test_large_ppms_that_are_read_number_by_number_are_refused():
    for data in (b"P3 4000 4000 255\n" + b"1 " * 999, b"P6 5000 5000 100\n" + bytes(999)):
        assert refused(data).kind == "image too large"
    assert (load_pixels(b"P3 1 1 255\n10 20 30\n", "text", SIZE)[:, 0, 0] == [10, 20, 30]).all()


@pytest.mark.parametrize("highest", [1.0, 0.5])
def test_floats_from_zero_to_one_are_scaled(highest):
    levels = np.linspace(0, highest, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    for odd, expected in ((np.nan, 0), (-3.0, 0), (np.inf, 255), (-np.inf, 0)):
        levels[0, 0] = odd
        pixels = load_pixels(encoded(Image.fromarray(levels), "TIFF"), "float", SIZE)
        assert pixels[0, 0, 0] == expected
        assert np.abs(pixels[0] - levels * 255)[1:].max() <= 0.51


@pytest.mark.parametrize(("lowest", "highest", "white"), [(-32768, 32767, 32767), (0, 2**31 - 1, 2**31 - 1)])
def test_wide_integers_are_scaled_to_their_range(lowest, highest, white):
    levels = np.linspace(lowest, highest, SIZE * SIZE).round().astype(np.int32).reshape(SIZE, SIZE)
    pixels = load_pixels(encoded(Image.fromarray(levels), "TIFF"), "wide", SIZE)
    assert np.abs(pixels[0] - levels.clip(0) / white * 255).max() <= 0.51


def gif_of_many_blocks(count):
    data = Image.new("P", (3, 3), 1)
    stream = io.BytesIO()
    data.save(stream, "GIF")
    whole = stream.getvalue()
    at = whole.index(b"\x2c")
    return whole[:at] + b"\x21\xfe" + b"\x01a" * count + b"\0" + whole[at:]


@pytest.mark.parametrize(
    "data",
    [
        b"P6 #" + b"a" * 3_000_000 + b"\n2 2 255\n" + bytes(12),
        b"P6" + b" " * 3_000_000 + b"2 2 255\n" + bytes(12),
        gif_of_many_blocks(1_000_000),
    ],
    ids=["a comment", "spaces", "a GIF's comment"],
)
def test_a_header_of_megabytes_is_not_read_byte_by_byte(data):
    begin = time.process_time()
    assert "no image starts in its first 1,048,576 bytes" in str(refused(data))
    assert time.process_time() - begin < 2


def test_a_long_comment_before_an_image_does_not_matter():
    plain = gif_of_many_blocks(0)
    assert np.array_equal(load_pixels(gif_of_many_blocks(100_000), "a.gif", SIZE), load_pixels(plain, "a.gif", SIZE))
    pixels = random.Random(1).randbytes(2_000_000)
    header = b"P6 1000 600 255\n"
    assert load_pixels(header + pixels[:1_800_000], "a.ppm", SIZE).shape == (3, SIZE, SIZE)


def test_a_picture_of_one_row_of_a_hundred_million_pixels_is_refused():
    stream = io.BytesIO()
    Image.new("L", (2, 2)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", 1, 90_000_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    assert "a side is too long" in str(refused(bytes(data)))


def test_notes_of_photoshop_by_the_megabyte_are_left_out():
    data = jpeg_of("RGB", "colour")
    notes = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\0" * 5000
    segments = (b"\xff\xed" + struct.pack(">H", len(notes) + 2) + notes) * 500
    begin = time.process_time()
    pixels = load_pixels(data[:2] + segments + data[2:], "a.jpg", SIZE)
    assert time.process_time() - begin < 1
    assert np.array_equal(pixels, load_pixels(data, "a.jpg", SIZE))
