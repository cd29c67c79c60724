"""The caches of a model between questions: weights laid out for decoding, features of images, prompts.

All follow from the weights and are dropped when these change: a model in training may answer at any time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from minimind_v.core.device import has_bf16
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.fast_decoder import FastDecoder
from minimind_v.core.model.kernels.cpu_linear import state_of
from minimind_v.core.model.kv_cache import KVCache
from minimind_v.core.model.vlm import VLM

IMAGES = 16  # images with cached features; 0.6 MB each with ViT-B/16
PROMPTS = 8  # cached prompts; 2 MB for each image in the small preset

PositionKeys = list[int | bytes]  # of each position of a prompt: its id, or the digest of its image


@dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt, and its keys and values [L, 1, KV, T, hd]."""

    positions: PositionKeys
    keys: Tensor
    values: Tensor


class PromptCache:
    """One model, ready to decode. Images are identified by their content."""

    def __init__(self, model: VLM) -> None:
        half = model.device.type == "cuda" and has_bf16(model.device)  # elsewhere it was not measured to gain
        dtype = torch.bfloat16 if half else model.lm_head.weight.dtype
        self.decoder = FastDecoder(model, dtype)
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._prefixes: list[Prefix] = []

    @torch.inference_mode()
    def features(self, model: VLM, images: Sequence[np.ndarray]) -> Tensor | None:
        """Features [M, P, width] of uint8 images [3, S, S]; only those that are not kept are encoded."""
        if not images:
            return None
        if model.vision_encoder is None:
            raise UsageError("this model was loaded without its vision encoder")
        digests = [image_digest(image) for image in images]
        new = {digest: image for digest, image in zip(digests, images, strict=True) if digest not in self._features}
        kept = {digest: self._features[digest] for digest in digests if digest not in new}
        if new:
            encoded = model.vision_encoder(torch.from_numpy(np.stack(list(new.values()))).to(model.device))
            kept |= {digest: features.clone() for digest, features in zip(new, encoded, strict=True)}
        for digest, features in kept.items():
            self._features[digest] = features
            self._features.move_to_end(digest)
        while len(self._features) > IMAGES:
            self._features.popitem(last=False)
        return torch.stack([kept[digest] for digest in digests])

    def recall(self, positions: PositionKeys, cache: KVCache) -> int:
        """Fill an empty cache with the longest kept beginning of a prompt; returns its number of tokens.

        The last token is never filled: its logits must be computed.
        """
        best, length = None, 0
        for prefix in self._prefixes:
            same = _common(prefix.positions, positions[:-1])
            if same > length:
                best, length = prefix, same
        if best is not None:
            self._prefixes.remove(best)
            self._prefixes.insert(0, best)
            cache.keys[..., :length, :] = best.keys[..., :length, :]
            cache.values[..., :length, :] = best.values[..., :length, :]
            cache.rewind(length)
        return length

    def remember(self, positions: PositionKeys, cache: KVCache) -> None:
        """Keep the keys and values of a prompt up to the end of its last image."""
        images = [at for at, key in enumerate(positions) if isinstance(key, bytes)]
        if not images:
            return
        end = images[-1] + 1
        positions = positions[:end]
        if any(prefix.positions[:end] == positions for prefix in self._prefixes):
            return
        kept = Prefix(positions, cache.keys[..., :end, :].clone(), cache.values[..., :end, :].clone())
        self._prefixes = [kept, *self._prefixes][:PROMPTS]


def image_digest(image: np.ndarray) -> bytes:
    """An image's name by its content."""
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()


def position_keys(input_ids: list[int], image_mask: list[bool], images: Sequence[np.ndarray]) -> PositionKeys:
    """The keys of a prompt with these images, in reading order."""
    positions: PositionKeys = list(input_ids)
    patches = [at for at, patch in enumerate(image_mask) if patch]
    names = [image_digest(image) for image in images]
    for order, at in enumerate(patches):
        positions[at] = names[order * len(names) // len(patches)]
    return positions


def _common(first: PositionKeys, second: PositionKeys) -> int:
    """Length of the beginning that two prompts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


# --- one per model ----------------------------------------------------------------------------------------------------

_READY: WeakKeyDictionary[nn.Module, tuple[object, PromptCache]] = WeakKeyDictionary()


def ready(model: VLM) -> PromptCache:
    """The caches of a model, made again only after its weights have changed."""
    weights = [*model.model.parameters(), *model.vision_proj.parameters()]
    state = id(model.vision_encoder), state_of(weights)
    entry = _READY.get(model)
    if entry is None or entry[0] != state:
        entry = _READY[model] = state, PromptCache(model)
    return entry[1]
