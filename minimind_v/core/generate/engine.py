"""From a prompt to token ids, one at a time; what is done with them is somebody else's business."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minimind_v.core.generate.sampling import Sampler
from minimind_v.core.model.text import KVCache
from minimind_v.core.model.vlm import VLM


@torch.inference_mode()
def generate(
    model: VLM,
    cache: KVCache,
    input_ids: Tensor,
    sampler: Sampler,
    eos_id: int,
    max_new_tokens: int,
    image_features: Tensor | None = None,
    image_mask: Tensor | None = None,
) -> Iterator[int]:
    """Read input_ids [1, T] behind what the cache holds, then yield new ids up to, and not with, `eos_id`.

    Pictures are looked at in the first step only. An id is in the cache once the next has been asked for.
    """
    out = model(input_ids, image_features=image_features, image_mask=image_mask, cache=cache, logits_to_keep=1)
    limit = min(max_new_tokens, cache.max_length - cache.used + 1)
    for count in range(1, limit + 1):
        assert out.logits is not None
        token = sampler(out.logits[0, -1])
        if token == eos_id:
            return
        yield token
        if count < limit:
            out = model(torch.tensor([[token]], device=input_ids.device), cache=cache, logits_to_keep=1)
