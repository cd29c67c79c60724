"""Look inside an answer: what each of its tokens owes to the image, and what the model makes of each patch.

    engine = Engine(model, tokenizer, most_rows=1)
    prompt = engine.prompt([{"role": "user", "content": "<image>\\nWhat is this?"}], ["dog.jpg"])
    trace = trace_answer(engine, prompt, TraceSettings(occlusion=True))

An answer is measured by one pass over its whole text for each variant of the images, in fp32: after the true tokens
before it, each token has a probability p and the information −log₂ p, in bits.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind_v.core.data.images import blank_pixels, encode_png
from minimind_v.core.data.thinking import TAGS
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.detokenize import TextStream
from minimind_v.core.generate.engine import Engine, Prompt, Request
from minimind_v.core.generate.inside import Inside, Vocabulary, Word, trace_pass
from minimind_v.core.generate.sampling import GREEDY, Sampler
from minimind_v.core.model.vlm import VLM
from minimind_v.core.rows.cells import data_uri

RIVALS = 5  # likeliest tokens besides an answer's own
WORDS = 5  # nearest to a patch
MOST_BLOCKS = 64  # of an image's occlusion map; a finer grid is painted in blocks of several patches
MOST_TOKENS = 1024  # of an answer: its attention has 12 kB per token in the small preset
BATCH_TOKENS = 4096  # of variants that go through the language model together
BATCH_IMAGES = 8  # that are encoded together

Patches = Sequence[tuple[int, int]]  # image and patch of that image, from 0, row by row


@dataclass(frozen=True)
class TraceSettings:
    """What `trace_answer` does besides measuring an answer."""

    answer: str | None = None  # the text that is measured; None: the model's own, with the likeliest tokens
    max_new_tokens: int = 128
    swap: Sequence[np.ndarray] = ()  # uint8 [3, S, S], images for the variant `swapped`, in the order of the prompt's
    occlude: Patches = ()  # patches that are painted grey for the variant `occluded`
    occlusion: bool = False  # whether every patch is painted in turn

    def __post_init__(self) -> None:
        if self.answer is not None and not isinstance(self.answer, str):
            raise UsageError(f"the answer must be a text, not {type(self.answer).__name__}")
        if self.answer is not None and not self.answer.strip():
            raise UsageError("the answer is empty — give a text, or leave it out for the model's own")


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


def nothing() -> None:
    """Do nothing."""


def trace_answer(
    engine: Engine,
    prompt: Prompt,
    settings: TraceSettings | None = None,
    question: str = "",
    check: Callable[[], None] = nothing,
) -> Trace:
    """Answer a prompt with images, or take the answer of the settings, and look into it.

    `question` is kept in the trace. `check` is called between tokens and batches: what it raises ends the work. From
    any thread; the engine answers others meanwhile. Raises UsageError for a prompt without images, an answer that is
    too long, patches that do not exist, or images to swap that do not match.
    """
    return _Tracer(engine, prompt, settings or TraceSettings(), check).trace(question)


class _Tracer:
    def __init__(self, engine: Engine, prompt: Prompt, settings: TraceSettings, check: Callable[[], None]) -> None:
        if not prompt.images:
            raise UsageError("looking inside needs an image: the question has none")
        self.engine, self.prompt, self.settings, self.check = engine, prompt, settings, check
        self.model, self.tokenizer, self.images = engine.model, engine.tokenizer, list(prompt.images)
        self.side = _side(self.model)
        self.vocabulary = Vocabulary(self.model, self.tokenizer)
        _check_patches(settings.occlude, len(self.images), self.side**2)
        if settings.swap and len(settings.swap) != len(self.images):
            raise UsageError(f"{len(settings.swap)} images to swap for {len(self.images)} images of the question")

    def trace(self, question: str) -> Trace:
        self.answer_ids = self._answer_ids()
        variants = {"blank": [blank_pixels(self.model.spec.image_size)] * len(self.images)}
        names = {"blank": "grey"}
        if self.settings.occlude:
            variants["occluded"], names["occluded"] = paint(self.images, self.settings.occlude, self.side), "painted"
        else:
            variants["swapped"], names["swapped"] = self._swapped()
        bits = dict(zip(variants, self.bits(list(variants.values())), strict=True))
        inside, patches = self._pass()
        block, occlusion = self._occlusion() if self.settings.occlusion else (1, None)
        columns = torch.tensor(self.prompt.tokens.image_mask, device=self.model.device).nonzero().flatten()
        return Trace(
            question=question,
            answer=self.tokenizer.decode(self.answer_ids),
            images=[TracedImage(image, self.side, self.side) for image in self.images],
            tokens=self._tokens(inside, bits["blank"]),
            attention=inside.attention[..., columns].cpu().numpy(),
            rollout=inside.rollout[:, columns].cpu().numpy(),
            patches=patches,
            variants={
                name: Variant(self._own_answer(images), bits[name], names[name]) for name, images in variants.items()
            },
            occlusion=occlusion,
            block=block,
            occluded=list(self.settings.occlude),
            given=self.settings.answer is not None,
        )

    # --- answers ------------------------------------------------------------------------------------------------------

    def _answer_ids(self) -> list[int]:
        """The answer's ids and, unless it was cut, the end token."""
        if self.settings.answer is None:
            return self._generate(self.prompt)
        ids = [*encode_answer(self.engine, self.settings.answer), self.tokenizer.eos_id]
        room = min(self.engine.context - len(self.prompt.tokens), MOST_TOKENS)
        if len(ids) > room:
            raise UsageError(f"the answer has {len(ids)} tokens, but there is room for {room} — shorten it")
        return ids

    def _own_answer(self, images: Sequence[np.ndarray]) -> str:
        return self.tokenizer.decode(self._generate(replace(self.prompt, images=images)))

    def _generate(self, prompt: Prompt) -> list[int]:
        """The likeliest token each time; the end token is among them where the answer ends before the limit."""
        ids: list[int] = []
        request = Request(prompt, Sampler(GREEDY), min(self.settings.max_new_tokens, MOST_TOKENS))
        with closing(self.engine.stream(request)) as events:  # also where `check` raises: the engine forgets it at once
            for event in events:
                self.check()
                if event.token is not None:
                    ids.append(event.token)
                elif event.end == "stop":
                    ids.append(self.tokenizer.eos_id)
        return ids

    # --- passes over the answer ---------------------------------------------------------------------------------------

    @property
    def _positions(self) -> Tensor:
        """The positions [N] at which the answer's tokens are predicted."""
        first = len(self.prompt.tokens) - 1
        return torch.arange(first, first + len(self.answer_ids), device=self.model.device)

    @torch.inference_mode()
    def _pass(self) -> tuple[Inside, list[TracedPatch]]:
        [x] = self._embedded([self.images])  # [1, T, D]
        inside = trace_pass(self.model, x, self._positions)
        mask = torch.tensor(self.prompt.tokens.image_mask, device=x.device)
        at = mask.nonzero().flatten()
        nearest, layers = self.vocabulary.nearest(x[0, at], WORDS), self.vocabulary.lens(inside.states[:, at])
        return inside, [TracedPatch(*pair) for pair in zip(nearest, layers, strict=True)]

    @torch.inference_mode()
    def bits(self, variants: Sequence[Sequence[np.ndarray]]) -> list[list[float]]:
        """The bits of each token of the answer, with each of several variants of the images."""
        targets, positions = torch.tensor(self.answer_ids, device=self.model.device), self._positions
        rows: list[list[float]] = []
        for x in self._embedded(variants):  # [B, T, D]
            starts = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
            hidden, _ = self.model.model(x, positions=(starts + positions).flatten())  # [B · N, D]
            logprobs = self.model.lm_head(hidden).float().log_softmax(dim=-1).unflatten(0, (len(x), -1))  # [B, N, V]
            own = logprobs.gather(-1, targets.expand(len(x), -1)[..., None])[..., 0]  # [B, N]
            rows += (-own / math.log(2)).tolist()
        return rows

    def _embedded(self, variants: Sequence[Sequence[np.ndarray]]) -> Iterator[Tensor]:
        """The text up to the last token, embedded with each variant's images: batches [B, T, D]."""
        tokens, device = self.prompt.tokens, self.model.device
        ids = torch.tensor([*tokens.input_ids, *self.answer_ids[:-1]], device=device)
        mask = torch.zeros(len(ids), dtype=torch.bool, device=device)
        mask[: len(tokens)] = torch.tensor(tokens.image_mask, device=device)
        text = self.model.embed(ids[None])  # [1, T, D]
        size = max(1, BATCH_TOKENS // len(ids))
        for start in range(0, len(variants), size):
            self.check()
            batch = variants[start : start + size]
            x = text.repeat(len(batch), 1, 1)
            x[:, mask] = embed_images(self.model, batch).to(x.dtype)
            yield x

    def _tokens(self, inside: Inside, blank: list[float]) -> list[TracedToken]:
        probabilities, tokens = inside.logits.softmax(dim=-1), []
        logprobs, texts = inside.logits.log_softmax(dim=-1), TextStream(self.tokenizer)
        for row, token in enumerate(self.answer_ids):
            text = texts.add(token) or self.vocabulary.name(token)  # a character of several tokens is in the last one
            bits = float(-logprobs[row, token] / math.log(2))
            rivals = self.vocabulary.likeliest(probabilities[row], RIVALS, without=token)
            tokens.append(TracedToken(text, float(probabilities[row, token]), bits, blank[row], rivals))
        return tokens

    # --- variants -----------------------------------------------------------------------------------------------------

    def _swapped(self) -> tuple[list[np.ndarray], str]:
        """Other images: the named ones; else each takes the place of the one before; else the mirrored image."""
        if self.settings.swap:
            return list(self.settings.swap), "another"
        if len(self.images) > 1:
            return [*self.images[1:], self.images[0]], "rotated"
        return [np.ascontiguousarray(image[:, :, ::-1]) for image in self.images], "mirrored"

    def _occlusion(self) -> tuple[int, np.ndarray]:
        """The side of a painted block, and the bits [T, P] that each token loses when a patch's block is grey."""
        block = next(size for size in range(1, self.side + 1) if math.ceil(self.side / size) ** 2 <= MOST_BLOCKS)
        blocks = self.side // block + bool(self.side % block)
        numbers = np.arange(self.side) // block
        block_of_patch = numbers[:, None] * blocks + numbers  # [rows, columns]
        painted = [
            paint(self.images, [(image, int(patch)) for patch in np.flatnonzero(block_of_patch == number)], self.side)
            for image in range(len(self.images))
            for number in range(blocks**2)
        ]
        whole, *rows = np.array(self.bits([self.images, *painted]), np.float32)
        lost = (np.stack(rows) - whole).reshape(len(self.images), blocks**2, -1)  # [images, blocks, T]
        return block, lost[:, block_of_patch.flatten()].reshape(-1, lost.shape[-1]).T.copy()


def encode_answer(engine: Engine, text: str) -> list[int]:
    """The ids of an answer's text as a model writes it: tags of reasoning and tools are tokens where it has them."""
    backend, ids = engine.tokenizer.backend, list[int]()
    tags = [tag for tag in TAGS if backend.token_to_id(tag) is not None]
    for piece in re.split(f"({'|'.join(tags)})", text) if tags else [text]:
        ids += [engine.tokenizer.token_id(piece)] if piece in tags else engine.tokenizer.encode(piece).ids
    return ids


def embed_images(model: VLM, variants: Sequence[Sequence[np.ndarray]]) -> Tensor:
    """The embeddings [B, P, D] of all patches of each variant's images. An image of several is encoded once."""
    if model.vision_encoder is None:
        raise UsageError("this model was loaded without its vision encoder")
    numbers: dict[bytes, int] = {}
    distinct: list[np.ndarray] = []
    rows: list[int] = []
    for images in variants:
        for image in images:
            if (content := image.tobytes()) not in numbers:
                numbers[content] = len(distinct)
                distinct.append(image)
            rows.append(numbers[content])
    embeddings = [
        model.vision_proj(model.vision_encoder(torch.from_numpy(np.stack(chunk)).to(model.device)).float())
        for chunk in (distinct[start : start + BATCH_IMAGES] for start in range(0, len(distinct), BATCH_IMAGES))
    ]
    return torch.cat(embeddings)[rows].reshape(len(variants), -1, model.config.hidden_size)


def paint(images: Sequence[np.ndarray], patches: Patches, side: int) -> list[np.ndarray]:
    """Copies of images [3, S, S] in which patches of a grid of `side` × `side` are grey, as a blank image is."""
    painted = [image.copy() for image in images]
    for number, patch in patches:
        image, size = painted[number], painted[number].shape[-1]
        row, column = divmod(patch, side)
        top, bottom, left, right = (at * size // side for at in (row, row + 1, column, column + 1))
        image[:, top:bottom, left:right] = blank_pixels(size)[:, top:bottom, left:right]
    return painted


def _side(model: VLM) -> int:
    """Patches on a side of an image. Raises UsageError where they are no square."""
    count = model.spec.tokens_per_image
    if (side := math.isqrt(count)) ** 2 != count:
        raise UsageError(f"looking inside needs a square grid of patches, but this model has {count} tokens per image")
    return side


def _check_patches(patches: Patches, images: int, count: int) -> None:
    for image, patch in patches:
        if not (0 <= image < images and 0 <= patch < count):
            raise UsageError(
                f"patch {patch} of image {image} cannot be painted: images are 0 to {images - 1}, "
                f"patches 0 to {count - 1}"
            )


def _base64(array: np.ndarray) -> str:
    ordered = array.astype(array.dtype.newbyteorder("<"))
    return base64.b64encode(np.ascontiguousarray(ordered).tobytes()).decode()


def _short(value: float) -> float:
    """A number with few digits: a trace has thousands."""
    return round(value, 5)
