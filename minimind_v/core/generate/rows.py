"""Rows that are decoded together: a prompt and the tokens drawn behind it, without text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind_v.core.generate.prompt_cache import BLOCK, EncodedImage, PromptCache, block_digests, ready
from minimind_v.core.generate.sampling import Sampler
from minimind_v.core.generate.slots import Numbers, Slots
from minimind_v.core.model.kernels.cpu_linear import FEW
from minimind_v.core.model.vlm import VLM

GPU_PIECE = 8 * BLOCK  # tokens of a prompt that a GPU reads in a step; a CPU reads one block

Draw = Callable[[Tensor, Sequence[int]], int]  # logits [V], ids of all text before → the next id; a `Sampler`, mostly


class Row:
    """A prompt, which is read piece by piece, and its answer so far."""

    def __init__(
        self,
        input_ids: Sequence[int],
        draw: Draw,
        max_new_tokens: int,
        image_mask: Sequence[bool] = (),
        images: Sequence[EncodedImage] = (),
    ) -> None:
        """`image_mask` is true at the positions of images, of which each takes the same number.

        Raises ValueError where they do not match the images.
        """
        self.input_ids, self.draw, self.max_new_tokens = list(input_ids), draw, max_new_tokens
        self.image_mask = list(image_mask) or [False] * len(self.input_ids)
        self.images, patches = list(images), sum(self.image_mask)
        if bool(patches) != bool(images) or (images and patches % len(images)):
            raise ValueError(f"{len(images)} images do not match {patches} placeholders")
        self.text_ids = [id for id, patch in zip(self.input_ids, self.image_mask, strict=True) if not patch]
        self.drawn: list[int] = []

    def begin(self, memory: PromptCache) -> None:
        """Make room for keys and values, and recall those of an earlier prompt that began in the same way."""
        self.memory = memory
        decoded = 0 if memory.decoder.uses_slots else self.max_new_tokens
        self.cache = memory.decoder.new_cache(1, len(self.input_ids) + decoded)
        self.digests = block_digests(self.input_ids, self.image_mask, self.images)
        last = len(self.input_ids) - 1  # its logits must be computed
        self.recalled = self.read = memory.recall(self.digests[: last // BLOCK], self.cache)
        self.embedded: Tensor | None = None  # the prompt behind what was recalled, [1, T, D]
        self._embeddings: list[Tensor] = []  # of its images, [P, D] each

    @property
    def is_read(self) -> bool:
        """Whether the model has read the prompt."""
        return self.read == len(self.input_ids)

    def embed(self, model: VLM) -> bool:
        """Embed the prompt behind what was recalled, and encode one image at most; returns whether it is complete."""
        mask = self.image_mask[self.recalled :]
        if any(mask):
            patches = sum(self.image_mask) // len(self.images)
            first, begin = divmod(sum(self.image_mask[: self.recalled]), patches)
            for image in self.images[first + len(self._embeddings) :]:
                is_encoded = self.memory.holds(image)
                self._embeddings.append(self.memory.embed(model, image))
                if not is_encoded and first + len(self._embeddings) < len(self.images):
                    return False
        self.embedded = model.embed(torch.tensor([self.input_ids[self.recalled :]], device=model.device))
        if self._embeddings:
            patch_embeddings = torch.cat(self._embeddings)[begin:]
            self.embedded[0, torch.tensor(mask, device=model.device)] = patch_embeddings
        return True

    def read_piece(self, size: int) -> Tensor:
        """Read the next tokens of the embedded prompt → logits [V] behind them."""
        assert self.embedded is not None
        begin = self.read - self.recalled
        piece = self.embedded[:, begin : begin + size]
        self.cache.rewind(self.read)
        [logits] = self.memory.decoder.read(piece, self.cache)
        self.memory.remember(self.digests, self.cache, self.read)
        self.read += piece.shape[1]
        return logits


@dataclass(frozen=True)
class Drawn:
    """What a step gave a row: a token and the logits [V] that it was drawn from, or the error that ends the row.

    On a GPU the logits stay until the next step.
    """

    row: Row
    token: int = -1
    logits: Tensor | None = None
    error: Exception | None = None


class Rows:
    """The rows that a model works on. With `in_company` each gets the bits that it would get alone, on a CPU."""

    def __init__(self, model: VLM, in_company: bool = False) -> None:
        self.model, self.in_company = model, in_company
        self._rows: list[Row] = []
        self._slots: Slots | None = None  # on a GPU, while there are rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row) -> None:
        """Let a row join at the next step."""
        if not self._rows:  # weights that have changed do not change amid an answer
            self._memory = ready(self.model)
        row.begin(self._memory)
        decoder = self._memory.decoder
        if not self._rows and decoder.uses_slots:
            self._slots = decoder.take_slots()
        self._rows.append(row)

    def remove(self, row: Row) -> None:
        """Let a row leave."""
        self._rows.remove(row)
        if self._slots is None:
            return
        if row in self._slots.rows:
            self._slots.leave(row)
        if not self._rows:
            self._memory.decoder.give_back(self._slots)
            self._slots = None

    @torch.inference_mode()
    def step(self) -> Iterator[Drawn]:
        """Read a piece of the first prompt that was not read, and decode a token of each row whose prompt was.

        Yields the new row first, so that its answer begins sooner; a row may be removed when it is yielded. Nothing
        happens unless all is iterated.
        """
        unread = next((row for row in self._rows if not row.is_read), None)
        decoding = [row for row in self._rows if row.is_read]
        if unread is not None:
            yield from self._read(unread)
        yield from self._decode(decoding) if self._slots is None else self._decode_together(self._slots, decoding)

    def _read(self, row: Row) -> list[Drawn]:
        try:
            if row.embedded is None and not row.embed(self.model):
                return []
            logits = row.read_piece(BLOCK if self.model.device.type == "cpu" else GPU_PIECE)
        except Exception as error:  # of this row alone
            return [Drawn(row, error=error)]
        return [_draw(row, logits.cpu())] if row.is_read else []

    def _decode(self, rows: Sequence[Row]) -> list[Drawn]:
        drawn: list[Drawn] = []
        for group in (rows[start : start + FEW] for start in range(0, len(rows), FEW)):
            try:
                logits = self._forward(group)
            except Exception as error:
                if len(rows) == 1:
                    return [Drawn(rows[0], error=error)]
                for row in group:  # who it was shows alone
                    drawn += self._decode([row])
            else:
                drawn += [_draw(row, row_logits) for row, row_logits in zip(group, logits, strict=True)]
        return drawn

    def _forward(self, rows: Sequence[Row]) -> Tensor:
        """Logits [B, V] behind the latest token of each row."""
        for row in rows:
            row.cache.rewind(len(row.input_ids) + len(row.drawn) - 1)  # a step that was interrupted is done again
        latest = torch.tensor([[row.drawn[-1]] for row in rows], device=self.model.device)
        caches = [row.cache for row in rows]
        return self._memory.decoder.step(self.model.embed(latest), caches, self.in_company).cpu()

    def _decode_together(self, slots: Slots, rows: Sequence[Row]) -> list[Drawn]:
        """A step on a GPU, which also draws for every row with a Sampler."""
        drawn: list[Drawn] = []
        for row in rows:
            try:
                if row not in slots.rows:
                    slots.enter(row, row.cache, row.text_ids, len(row.input_ids) + row.max_new_tokens)
            except Exception as error:  # no memory for this row
                drawn.append(Drawn(row, error=error))
        decoding = [row for row in slots.rows if isinstance(row, Row)]
        if not decoding:
            return drawn
        try:
            tokens = slots.step(self._memory.decoder.decode, [_numbers(row) for row in decoding])
        except Exception as error:
            return [Drawn(row, error=error) for row in rows]
        for row, token, logits in zip(decoding, tokens, slots.logits, strict=False):
            if (sampler := _sampler(row)) is None:
                drawn.append(_draw(row, logits.cpu()))
            else:
                drawn.append(_keep(row, token, logits))
                sampler.spend()
        return drawn


def _sampler(row: Row) -> Sampler | None:
    """The sampler of a row whose draws a GPU can do; it has no deterministic sums."""
    return row.draw if isinstance(row.draw, Sampler) and not torch.are_deterministic_algorithms_enabled() else None


def _numbers(row: Row) -> Numbers:
    """What a GPU needs to know of a row for its next token."""
    latest = row.drawn[-1], len(row.input_ids) + len(row.drawn) - 1
    sampler = _sampler(row)
    return Numbers(*latest) if sampler is None else Numbers(*latest, sampler.point, sampler.sampling)


def _draw(row: Row, logits: Tensor) -> Drawn:
    try:
        token = row.draw(logits, row.text_ids)
    except Exception as error:
        return Drawn(row, error=error)
    return _keep(row, token, logits)


def _keep(row: Row, token: int, logits: Tensor) -> Drawn:
    row.drawn.append(token)
    row.text_ids.append(token)
    return Drawn(row, token, logits)


def generate(model: VLM, row: Row, eos_id: int) -> Iterator[int]:
    """Yield the ids of a single row's answer up to, and not with, `eos_id`, or `max_new_tokens` of them."""
    rows = Rows(model)
    rows.add(row)
    try:
        for _ in range(row.max_new_tokens):
            while not (drawn := list(rows.step())):
                pass
            if drawn[0].error is not None:
                raise drawn[0].error
            if drawn[0].token == eos_id:
                return
            yield drawn[0].token
    finally:
        rows.remove(row)
