"""Pictures per second of decoding: ours against decoding at full size, and how far the two are apart.

    python -m benchmarks.pictures            five rounds, about a minute
    python -m benchmarks.pictures --quick    one round

JPEGs as cameras and the published sets have them: a natural (1/f) spectrum, edges, text, chroma subsampled. The other
side is the published code: Pillow's full decoding, `convert`, bicubic resize of the short side, centre crop. One
process, one thread; sides take turns. Differences are grey levels of 255 in the 224² pixels that CLIP is shown; where
ours decodes at full size they must be at most one, else nothing is compared.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from minimind_v.core.data.images import DRAFT_MARGIN, load_pixels

SIZE = 224
SHAPES = ((448, 336), (640, 480), (1024, 768), (1280, 960), (1600, 1200), (4000, 3000))
QUALITY = 90
PICTURES = 4  # of each shape
SECONDS = 0.8  # of each side in a round, at least


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """A picture with the spectrum of natural ones, figures with hard edges, lines and text."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    waves = rng.standard_normal((2, 3, *frequency.shape))
    planes = np.fft.irfft2((waves[0] + 1j * waves[1]) / frequency, s=(height, width))
    planes = (planes - planes.mean((1, 2), keepdims=True)) / planes.std((1, 2), keepdims=True)
    levels = 128 + 45 * planes[:1] + 15 * planes  # mostly light and dark, a little colour
    picture = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0).copy())
    draw, side = ImageDraw.Draw(picture), min(width, height)
    for number in range(12):
        x, y, far_x, far_y = (int(rng.integers(0, limit)) for limit in (width, height, width, height))
        colour, reach = tuple(rng.integers(0, 256, 3).tolist()), int(rng.integers(side // 20, side // 4))
        (draw.ellipse if number % 2 else draw.rectangle)((x, y, x + reach, y + reach // 2), fill=colour)
        draw.line((x, y, far_x, far_y), fill=colour, width=max(1, reach // 30))
        if number % 2:
            font = ImageFont.load_default(size=float(max(8, side // int(rng.integers(10, 40)))))
            draw.text((far_x - side // 2, far_y), "The quick brown fox 0123", fill=(0, 0, 0), font=font)
    return picture


def as_jpeg(picture: Image.Image) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def as_published(data: bytes) -> np.ndarray:
    """What the published code makes of a file, before it normalises: uint8 [3, size, size]."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = picture.size
    short = min(width, height)
    picture = picture.resize((int(SIZE * width / short), int(SIZE * height / short)), Image.Resampling.BICUBIC)
    left, top = (picture.width - SIZE) // 2, (picture.height - SIZE) // 2
    return np.asarray(picture.crop((left, top, left + SIZE, top + SIZE))).transpose(2, 0, 1).copy()


def ours(data: bytes) -> np.ndarray:
    """What ours makes of it."""
    return load_pixels(data, "picture", SIZE)


def rate(work: Callable[[bytes], np.ndarray], files: list[bytes]) -> float:
    """Pictures per second."""
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS or not done:
        for data in files:
            work(data)
        done += len(files)
    return done / (time.perf_counter() - begun)


def differences(files: list[bytes]) -> dict[str, float]:
    """How far ours is from the published code, in grey levels."""
    apart = np.stack([np.abs(ours(data).astype(int) - as_published(data).astype(int)) for data in files])
    return {"mean": float(apart.mean()), "p99": float(np.percentile(apart, 99)), "largest": int(apart.max())}


def drafted_at(width: int, height: int) -> int:
    """The scale that ours decodes at: 1, 2, 4 or 8."""
    return next(scale for scale in (8, 4, 2, 1) if scale == 1 or min(width, height) >= scale * DRAFT_MARGIN * SIZE)


def compare(width: int, height: int, rounds: int) -> dict:
    """Measure both sides on pictures of one shape."""
    files = [as_jpeg(photograph(width, height, seed)) for seed in range(PICTURES)]
    result: dict = {"width": width, "height": height, "scale": drafted_at(width, height), **differences(files)}
    if result["scale"] == 1 and result["largest"] > 1:
        raise SystemExit(
            f"{width}×{height}: {result['largest']} grey levels apart without a draft: nothing is compared"
        )
    rates: dict[str, list[float]] = {"ours": [], "published": []}
    for _ in range(rounds):
        rates["ours"].append(rate(ours, files))
        rates["published"].append(rate(as_published, files))
    result |= {side: statistics.median(measured) for side, measured in rates.items()}
    return result | {"rates": rates}


def main() -> None:
    """Read the options, measure, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often every side is measured [5]")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    options = parser.parse_args()
    print(
        f"{'JPEG':12}{'decoded at':>11}{'ours':>10}{'published':>11}{'ratio':>8}   grey levels apart (mean, 99 %, most)"
    )
    results = []
    for width, height in SHAPES:
        entry = compare(width, height, 1 if options.quick else options.rounds)
        results.append(entry)
        scale = "full size" if entry["scale"] == 1 else f"1/{entry['scale']}"
        print(
            f"{f'{width}×{height}':12}{scale:>11}{entry['ours']:8.1f}/s{entry['published']:9.1f}/s"
            f"{entry['ours'] / entry['published']:8.2f}   {entry['mean']:.2f}, {entry['p99']:.0f}, {entry['largest']}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
