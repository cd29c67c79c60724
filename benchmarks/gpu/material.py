"""Rows, pictures, a tower and weights, made from a seed on all cores. Nothing is downloaded."""

from __future__ import annotations

import os
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.gpu import curve
from benchmarks.gpu.card import Card, Result
from benchmarks.material import make_pictures, write_rows, write_tower, write_weights

SEED = 42
ROWS = {"pretrain": 4096, "sft": 1024, "large": 512}  # `large`: for decoding only
TINY_ROWS = {"pretrain": 48, "sft": 16, "large": 16}
SIZES = {"pretrain": (128, 128), "sft": (128, 128), "large": (448, 336)}  # the published data has 128²
DEMO_TOKENIZER = Path(__file__).resolve().parents[2] / "minimind_v" / "core" / "demo" / "assets"


def material(card: Card, result: Result) -> None:
    """Write what all later parts read."""
    tokenizer = card.carried / "tokenizer" if card.carried else None
    source = tokenizer if tokenizer and tokenizer.is_dir() else DEMO_TOKENIZER
    result["tokenizer"] = "published" if source is tokenizer else "the demo's"
    (card.folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, card.folder / "tokenizer" / name)
    rng = random.Random(SEED)
    workers = 2 if card.tiny else max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for stage, count in (TINY_ROWS if card.tiny else ROWS).items():
            each = -(-count // workers)
            shares = [min(each, count - begin) for begin in range(0, count, each)]
            jobs = [pool.submit(make_pictures, rng.getrandbits(32), share, SIZES[stage]) for share in shares]
            pictures = [picture for job in jobs for picture in job.result()]
            write_rows(card.folder, stage, pictures, rng)
            result[stage] = {"rows": len(pictures), "bytes_a_picture": sum(map(len, pictures)) // len(pictures)}
    write_tower(card.folder / "vision", card.tower, SEED)
    write_weights(card.folder / "weights.safetensors", card.text("small"), SEED)
    card.reference = curve.start(card.tiny)
