"""The fixed prompts and images on which an export is compared with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from minimind_v.core.data.prompt import IMAGE_MARK

SIZES = ((300, 200), (180, 260), (240, 240))  # width, height of the images


@dataclass(frozen=True)
class Case:
    """A conversation with an `<image>` for each image, and the numbers of its images."""

    conversations: list[dict[str, str]]
    images: tuple[int, ...] = ()

    @property
    def standard(self) -> list[dict[str, Any]]:
        """The conversation as messages of items, the format of all other programs."""
        return [{"role": message["role"], "content": _content(message["content"])} for message in self.conversations]


def _content(text: str) -> list[dict[str, str]]:
    items: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            items.append({"type": "image"})
        if text := piece.strip("\n"):
            items.append({"type": "text", "text": text})
    return items


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


CASES = (
    Case(_turns("请描述这张图片。🙂\n<image>"), (1,)),
    Case(
        [
            {"role": "system", "content": "Answer in one word."},
            *_turns("<image>\n<image>\nWhich is brighter?", "The second.", "<image>\nThan this? `x = a[0] @ b`"),
        ],
        (2, 0, 1),
    ),
    Case(_turns("Who are you? " + "@" * 200)),
)


def images() -> list[Image.Image]:
    """Soft clouds of colour, the same in every call."""
    rng = np.random.default_rng(0)
    clouds = [Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)) for _ in SIZES]
    return [cloud.resize(size, Image.Resampling.BICUBIC) for cloud, size in zip(clouds, SIZES, strict=True)]
