"""What looking inside an answer finds: its tokens, attention, patches, and what other images change."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minimind_v.core.data.images import encode_png
from minimind_v.core.generate.inside import Word
from minimind_v.core.rows.cells import data_uri


@dataclass(frozen=True)
class TracedToken:
    """A token of the answer."""

    text: str
    probability: float
    bits: float  # −log₂ of the probability
    bits_blank: float  # the same with blank images
    rivals: list[Word]  # the likeliest other tokens and their probabilities

    @property
    def gain(self) -> float:
        """The bits that the images give: how much less surprising they make the token."""
        return self.bits_blank - self.bits


@dataclass(frozen=True)
class TracedImage:
    """An image as the model received it, and its grid of patches."""

    pixels: np.ndarray  # uint8 [3, S, S]
    rows: int
    columns: int


@dataclass(frozen=True)
class TracedPatch:
    """What the language model receives for a patch, and makes of it."""

    nearest: list[Word]  # words nearest to its embedding, with their cosines
    layers: list[Word]  # the likeliest next token of its state behind each layer, with its probability


@dataclass(frozen=True)
class Variant:
    """The same question with other images."""

    answer: str  # the model's own, with the likeliest tokens
    bits: list[float]  # of each token of the traced answer
    images: str  # what the images were


@dataclass(frozen=True)
class Trace:
    """An answer of T tokens, looked into: L layers of H heads, P patches of all images in reading order."""

    question: str
    answer: str
    images: list[TracedImage]
    tokens: list[TracedToken]
    attention: np.ndarray  # float32 [T, L, H, P]: weights from where a token is predicted, the position before it
    rollout: np.ndarray  # float32 [T, P]: these rolled up through all heads and layers
    patches: list[TracedPatch]
    variants: dict[str, Variant]  # blank, swapped and, where patches were painted, occluded
    occlusion: np.ndarray | None = None  # float32 [T, P]: bits that a token loses when the patch is grey
    block: int = 1  # patches on a side of what was painted at a time for `occlusion`
    occluded: list[tuple[int, int]] = field(default_factory=list)  # the patches that were painted
    given: bool = False  # whether the answer was given as a text, and not the model's own
    model: str = ""

    def as_json(self) -> dict[str, Any]:
        """The trace as JSON that the page and `mmv look --json` have.

        Arrays are base64: `attention.data` is uint8 [T, L, H, P], and a weight is data · scale · peaks [T, L, H]
        (float32, little-endian); `rollout` and `occlusion.bits` are float32 [T, P].
        """
        peaks = self.attention.max(axis=-1, initial=0.0)  # [T, L, H]
        levels = np.rint(255 * self.attention / np.maximum(peaks, 1e-12)[..., None])
        _, layers, heads, patches = self.attention.shape
        return {
            "model": self.model,
            "question": self.question,
            "answer": self.answer,
            "given": self.given,
            "images": [
                {"src": data_uri(encode_png(image.pixels), "png"), "rows": image.rows, "columns": image.columns}
                for image in self.images
            ],
            "tokens": [
                {
                    "text": token.text, "probability": token.probability,
                    "bits": _short(token.bits), "bits_blank": _short(token.bits_blank),
                    "rivals": [{"text": word.text, "probability": word.value} for word in token.rivals],
                }
                for token in self.tokens
            ],
            "attention": {
                "layers": layers, "heads": heads, "patches": patches, "scale": 1 / 255,
                "data": _base64(levels.astype(np.uint8)), "peaks": _base64(peaks),
            },
            "rollout": _base64(self.rollout),
            "patches": [
                {
                    "words": [{"text": word.text, "similarity": _short(word.value)} for word in patch.nearest],
                    "layers": [{"text": word.text, "probability": _short(word.value)} for word in patch.layers],
                }
                for patch in self.patches
            ],
            "variants": {
                name: {"answer": variant.answer, "bits": list(map(_short, variant.bits)), "images": variant.images}
                for name, variant in self.variants.items()
            },
            **({} if self.occlusion is None else {
                "occlusion": {"bits": _base64(self.occlusion), "block": self.block},
            }),
            **({"occluded": [list(pair) for pair in self.occluded]} if self.occluded else {}),
        }  # fmt: skip


def _base64(array: np.ndarray) -> str:
    ordered = array.astype(array.dtype.newbyteorder("<"))
    return base64.b64encode(np.ascontiguousarray(ordered).tobytes()).decode()


def _short(value: float) -> float:
    """A number with few digits: a trace has thousands."""
    return round(value, 5)
