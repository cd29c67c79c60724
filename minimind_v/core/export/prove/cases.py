"""The fixed prompts and images on which an export is compared with its source, and transformers' answers to them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minimind_v.core.data.prompt import IMAGE_MARK
from minimind_v.core.errors import RunError

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


def ask(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """The answers of an exported folder's model to the cases. Raises RunError where it cannot be opened."""
    from minimind_v.core.export.prove import ask_hf  # transformers

    with tempfile.TemporaryDirectory(prefix="mmv-verify-") as work:
        names = [str(Path(work) / f"{number}.png") for number in range(len(SIZES))]
        for name, image in zip(names, images(), strict=True):
            image.save(name)
        cases = [{"messages": case.standard, "pictures": [names[n] for n in case.images]} for case in CASES]
        try:
            return ask_hf.ask(str(folder), cases, dtype)
        except Exception as error:  # libraries raise many kinds
            reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
            raise RunError(f"transformers could not open the export ({reason:.300}); the export was removed") from error
