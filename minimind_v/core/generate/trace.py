"""Look inside an answer: what each of its tokens owes to the image, and what the model makes of each patch.

    engine = Engine(model, tokenizer, most_rows=1)
    prompt = engine.prompt([{"role": "user", "content": "<image>\\nWhat is this?"}], ["dog.jpg"])
    trace = trace_answer(engine, prompt, TraceSettings(occlusion=True))

An answer is measured by one pass over its whole text for each variant of the images, in fp32: after the true tokens
before it, each token has a probability p and the information −log₂ p, in bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minimind_v.core.data.images import blank_pixels
from minimind_v.core.data.thinking import TAGS
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.detokenize import TextStream
from minimind_v.core.generate.engine import Engine, Prompt, Request
from minimind_v.core.generate.inside import Inside, Vocabulary, trace_pass
from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.generate.sampling import GREEDY, Sampler
from minimind_v.core.generate.traced import Trace, TracedImage, TracedPatch, TracedToken, Variant
from minimind_v.core.model.vlm import VLM

RIVALS = 5  # likeliest tokens besides an answer's own
WORDS = 5  # nearest to a patch
MOST_BLOCKS = 64  # of an image's occlusion map; a finer grid is painted in blocks of several patches
MOST_TOKENS = 1024  # of an answer: its attention has 12 kB per token in the small preset
BATCH_TOKENS = 4096  # of variants that go through the language model together
BATCH_BLOCKS = 8  # painted blocks that are measured together

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
        if self.answer is not None and not self.answer.strip():
            raise UsageError("the answer is empty — give a text, or leave it out for the model's own")


def trace_answer(
    engine: Engine,
    prompt: Prompt,
    settings: TraceSettings | None = None,
    question: str = "",
    check: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Answer a prompt with images, or take the answer of the settings, and look into it.

    `question` is kept in the trace. `check` is called between tokens and batches: what it raises ends the work.
    `progress` gets the painted blocks that are done for `occlusion`, and their number. From any thread; the engine
    answers others meanwhile. Raises UsageError for a prompt without images, an answer that is too long, patches that do
    not exist, or images to swap that do not match.
    """
    return _Tracer(engine, prompt, settings or TraceSettings(), check, progress or _ignore).trace(question)


class _Tracer:
    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        settings: TraceSettings,
        check: Callable[[], None],
        progress: Callable[[int, int], None],
    ) -> None:
        if not prompt.images:
            raise UsageError("looking inside needs an image: the question has none")
        self.engine, self.prompt, self.settings, self.check, self.progress = engine, prompt, settings, check, progress
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
        tokens = self._tokens(inside, bits["blank"])
        block, occlusion = self._occlusion([token.bits for token in tokens]) if self.settings.occlusion else (1, None)
        columns = torch.tensor(self.prompt.tokens.image_mask, device=self.model.device).nonzero().flatten()
        return Trace(
            question=question,
            answer=self.tokenizer.decode(self.answer_ids),
            images=[TracedImage(image, self.side, self.side) for image in self.images],
            tokens=tokens,
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
    def bits(self, variants: Sequence[Sequence[np.ndarray]], keep: bool = True) -> list[list[float]]:
        """The bits of each token of the answer, with each of several variants of the images."""
        targets, positions = torch.tensor(self.answer_ids, device=self.model.device), self._positions
        rows: list[list[float]] = []
        for x in self._embedded(variants, keep):  # [B, T, D]
            starts = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
            hidden, _ = self.model.model(x, positions=(starts + positions).flatten())  # [B · N, D]
            logprobs = self.model.lm_head(hidden).float().log_softmax(dim=-1).unflatten(0, (len(x), -1))  # [B, N, V]
            own = logprobs.gather(-1, targets.expand(len(x), -1)[..., None])[..., 0]  # [B, N]
            rows += (-own / math.log(2)).tolist()
        return rows

    def _embedded(self, variants: Sequence[Sequence[np.ndarray]], keep: bool = True) -> Iterator[Tensor]:
        """The text up to the last token, embedded with each variant's images, which are kept: batches [B, T, D]."""
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
            x[:, mask] = embed_images(self.model, batch, keep).to(x.dtype)
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

    def _occlusion(self, own: Sequence[float]) -> tuple[int, np.ndarray]:
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
        rows: list[list[float]] = []
        for start in range(0, len(painted), BATCH_BLOCKS):
            self.progress(start, len(painted))
            rows += self.bits(painted[start : start + BATCH_BLOCKS], keep=False)
        self.progress(len(painted), len(painted))
        lost = np.array(rows, np.float32) - np.array(own, np.float32)  # [images · blocks, T]
        lost = lost.reshape(len(self.images), blocks**2, -1)
        return block, lost[:, block_of_patch.flatten()].reshape(-1, lost.shape[-1]).T.copy()


def _ignore(done: int, total: int) -> None:
    """Report no progress."""


def encode_answer(engine: Engine, text: str) -> list[int]:
    """The ids of an answer's text as a model writes it: tags of reasoning and tools are tokens where it has them."""
    backend, ids = engine.tokenizer.backend, list[int]()
    tags = [tag for tag in TAGS if backend.token_to_id(tag) is not None]
    for piece in re.split(f"({'|'.join(tags)})", text) if tags else [text]:
        ids += [engine.tokenizer.token_id(piece)] if piece in tags else engine.tokenizer.encode(piece).ids
    return ids


def embed_images(model: VLM, variants: Sequence[Sequence[np.ndarray]], keep: bool = True) -> Tensor:
    """The embeddings [B, P, D] of all patches of each variant's images.

    What is kept for the model's answers is not encoded again; `keep`: the others are kept, too.
    """
    memory = ready(model)
    rows = [torch.cat([memory.embed(model, image, keep) for image in images]) for images in variants]
    return torch.stack(rows)


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
