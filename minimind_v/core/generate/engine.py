"""From prompts to token ids: reads a prompt, then samples one token at a time for one row or several."""

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

    The cache is one of `ready(model).decoder`. Images are read in the first step only. An id is in the cache
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

    Each step yields (row, id) of the rows that continue, in no particular order. A row ends before its `eos_id`, at its
    limit, or where the cache is full, and leaves the cache, so that the others run faster.
    """
    decoder = ready(model).decoder
    room = cache.max_length - cache.used - input_ids.shape[1] + 1
    rows = list(range(len(input_ids)))  # the row of input_ids that each row of the cache holds
    logits = decoder.read(model.embed(input_ids, image_features, image_mask), cache, attention_mask)
    for count in range(1, min(max(limits), room) + 1):
        ids = [samplers[row](row_logits) for row, row_logits in zip(rows, logits.cpu(), strict=True)]
        _drop([index for index, token in enumerate(ids) if token == eos_id], cache, rows, ids)
        if rows:
            yield list(zip(rows, ids, strict=True))
        _drop([index for index, row in enumerate(rows) if limits[row] <= count], cache, rows, ids)
        if not rows:
            return
        if count < room:
            logits = decoder.read(model.embed(torch.tensor(ids, device=input_ids.device)[:, None]), cache)


def _drop(ended: list[int], cache: KVCache, rows: list[int], ids: list[int]) -> None:
    """Drop rows by their index in the cache; the last row moves to each index. The cache keeps its last row."""
    for index in reversed(ended):
        if len(rows) > 1:
            cache.drop(index)
        for values in (rows, ids):
            values[index] = values[-1]
            values.pop()
