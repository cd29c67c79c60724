"""From prompts to token ids, step by step; what is done with them is somebody else's business."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.model.kv_cache import KVCache
from minimind_v.core.model.vlm import VLM

Draw = Callable[[Tensor], int]  # logits [V] → the next id; a `Sampler`, mostly


def generate(
    model: VLM,
    cache: KVCache,
    input_ids: Tensor,
    sampler: Draw,
    eos_id: int,
    max_new_tokens: int,
    image_features: Tensor | None = None,
    image_mask: Tensor | None = None,
) -> Iterator[int]:
    """Read input_ids [1, T] behind what the cache holds, then yield new ids up to, and not with, `eos_id`.

    The cache is one of `ready(model).decoder`. Pictures are looked at in the first step only. An id is in the cache
    once the next has been asked for.
    """
    limits = [max_new_tokens]
    for step in generate_rows(model, cache, input_ids, [sampler], eos_id, limits, None, image_features, image_mask):
        yield step[0][1]


@torch.inference_mode()
def generate_rows(
    model: VLM,
    cache: KVCache,
    input_ids: Tensor,
    samplers: Sequence[Draw],
    eos_id: int,
    limits: Sequence[int],
    attention_mask: Tensor | None = None,
    image_features: Tensor | None = None,
    image_mask: Tensor | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Several rows at once: input_ids [B, T], right-padded; for each a sampler and how many ids it may get.

    Each step yields (row, id) of the rows that go on, in no particular order. A row ends before its `eos_id`, at its
    limit, or where the cache is full, and leaves the cache, so that the others go on faster.
    """
    decoder = ready(model).decoder
    room = cache.max_length - cache.used - input_ids.shape[1] + 1
    rows = list(range(len(input_ids)))  # which row each of the cache's is
    logits = decoder.read(model.embed(input_ids, image_features, image_mask), cache, attention_mask)
    for count in range(1, min(max(limits), room) + 1):
        ids = [samplers[row](one) for row, one in zip(rows, logits.cpu(), strict=True)]
        _leave([at for at, token in enumerate(ids) if token == eos_id], cache, rows, ids)
        if rows:
            yield list(zip(rows, ids, strict=True))
        _leave([at for at, row in enumerate(rows) if limits[row] <= count], cache, rows, ids)
        if not rows:
            return
        if count < room:
            logits = decoder.read(model.embed(torch.tensor(ids, device=input_ids.device)[:, None]), cache)


def _leave(gone: list[int], cache: KVCache, rows: list[int], ids: list[int]) -> None:
    """Take rows out, by their places; each time the last one takes the place. The cache of the last row is kept."""
    for at in reversed(gone):
        if len(rows) > 1:
            cache.drop(at)
        for parts in (rows, ids):
            parts[at] = parts[-1]
            parts.pop()
