"""From prompts to token ids, step by step; what is done with them is somebody else's business."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minimind_v.core.generate.ready import ready
from minimind_v.core.model.text import KVCache
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
    for step in generate_rows(
        model, cache, input_ids, [sampler], eos_id, max_new_tokens, None, image_features, image_mask
    ):
        yield step[0][1]


@torch.inference_mode()
def generate_rows(
    model: VLM,
    cache: KVCache,
    input_ids: Tensor,
    samplers: Sequence[Draw],
    eos_id: int,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    image_features: Tensor | None = None,
    image_mask: Tensor | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Several rows at once: input_ids [B, T], right-padded, one sampler each; the other arguments as in `VLM.forward`.

    Each step yields (row, id) for the rows that go on, in no particular order. A row ends before its `eos_id`, and
    leaves the cache, so that the others go on faster; all end where the cache is full.
    """
    decoder = ready(model).decoder
    limit = min(max_new_tokens, cache.max_length - cache.used - input_ids.shape[1] + 1)
    logits = decoder.read(model.embed(input_ids, image_features, image_mask), cache, attention_mask)
    rows = list(range(len(input_ids)))  # which row each of the cache's is
    for count in range(1, limit + 1):
        ids = [samplers[row](one) for row, one in zip(rows, logits.cpu(), strict=True)]
        for at in reversed(range(len(rows))):
            if ids[at] == eos_id:
                if len(rows) > 1:
                    cache.drop(at)
                for parts in (rows, ids):
                    parts[at] = parts[-1]
                    parts.pop()
        if not rows:
            return
        yield list(zip(rows, ids, strict=True))
        if count < limit:
            logits = decoder.read(model.embed(torch.tensor(ids, device=input_ids.device)[:, None]), cache)
