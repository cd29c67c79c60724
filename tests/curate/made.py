"""What the tests of this package share: rows with every trouble that a preview must survive, and what reads them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

from PIL import Image

from minimind_v.core.config.recipes import sft
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.model.vision.encoder import read_vision_spec

ASSETS = Path(__file__).parents[2] / "minimind_v" / "core" / "demo" / "assets"
PUBLISHED = Path(__file__).parents[3] / "shared" / "tokenizer"
SPEC = read_vision_spec(ASSETS / "vision")  # 64 pixels, patches of 8: 64 tokens per picture


def encoder(folder: Path = ASSETS) -> PromptEncoder:
    return PromptEncoder(Tokenizer.load(folder), SPEC.tokens_per_image)


def recipe(max_length: int = 1536, batch_size: int = 4, epochs: int = 2, accumulate: int = 1):
    config = sft()
    data = replace(config.data, max_length=max_length, batch_size=batch_size)
    return replace(
        config, data=data, epochs=epochs, accumulate=accumulate, vision_model=ASSETS / "vision", device="cpu"
    )


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def write(folder: Path, rows: list) -> Path:
    """`t_data.jsonl` and, beside it, pictures in `t_images`: wide.png (30 × 10), square.png and broken.jpg."""
    pictures = folder / "t_images"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, size in (("wide.png", (30, 10)), ("square.png", (20, 20))):
        picture = Image.new("RGB", size, "red")
        picture.paste("blue", (size[0] // 3, 0, size[0] - size[0] // 3, size[1]))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        (pictures / name).write_bytes(buffer.getvalue())
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(50))
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "t_data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "t_data.jsonl"


HOSTILE = '<script>alert(1)</script>"><img src=http://evil/x onerror=alert(1)> \x1b[31m\x07\u202e </style>'
TROUBLE = [
    {"conversations": talk("<image>\n" + HOSTILE, HOSTILE), "image": "wide.png"},
    "{not json",
    {"conversations": "nonsense </pre><script>"},
    {"conversations": talk("<image>", "gone"), "image": "<b>gone</b>.jpg"},
    {"conversations": talk("<image>", "broken"), "image": "broken.jpg"},
    {"conversations": talk("no picture", "two <image> <image>"), "image": "wide.png"},
    r'{"conversations": [{"role": "user", "content": "没人回答 \ud800"}]}',
    {"conversations": talk("a", "b", "nobody answers this")},
    {"conversations": talk("long " * 3000, "short")},
]
