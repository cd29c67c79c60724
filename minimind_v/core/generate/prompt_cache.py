"""What a model keeps between questions: weights laid out for decoding, embedded images, keys and values of prompts.

All follow from the weights and are dropped when these change: a model in training may answer at any time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
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

IMAGE_BYTES = 64 << 20  # of embedded images; 0.4 MB each in the small preset
PREFIX_BYTES = 256 << 20  # of keys and values; 8 kB for a token in the small preset
BLOCK = 64  # tokens whose keys and values are kept together

EncodedImage = np.ndarray | Tensor  # uint8 [3, S, S], or its features [P, width]
SIZE = 16  # bytes of a digest


class Store:
    """Tensors by the digest of what they follow from. Beyond `limit` bytes the least recently used are dropped.

    From any thread: an answer may be looked into beside the engine.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size, self._lock = limit, 0, Lock()
        self._tensors: OrderedDict[bytes, Tensor] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self, key: bytes) -> Tensor | None:
        """The tensor of this key, which is used now; None without one."""
        with self._lock:
            if key in self._tensors:
                self._tensors.move_to_end(key)
            return self._tensors.get(key)

    def add(self, key: bytes, tensor: Tensor) -> None:
        """Keep a tensor, unless one of this key is kept."""
        with self._lock:
            if key not in self._tensors:
                self._tensors[key] = tensor
                self.size += tensor.nbytes
            while self.size > self.limit:
                self.size -= self._tensors.popitem(last=False)[1].nbytes


class PromptCache:
    """One model, ready to decode. Images are identified by their content, a block by all tokens up to its end.

    A block holds what a prompt's whole piece of 64 tokens gives, at a multiple of 64: the same bits for each prompt
    that begins so. What was decoded token by token is not kept, since its bits differ.
    """

    def __init__(self, model: VLM) -> None:
        half = model.device.type == "cuda" and has_bf16(model.device)  # elsewhere it was not measured to gain
        dtype = torch.bfloat16 if half else model.lm_head.weight.dtype
        self.decoder = FastDecoder(model, dtype)
        self.images, self.prefixes = Store(IMAGE_BYTES), Store(PREFIX_BYTES)

    def holds(self, image: EncodedImage) -> bool:
        """Whether an image need not be encoded."""
        return image_digest(image) in self.images

    @torch.inference_mode()
    def embed(self, model: VLM, image: EncodedImage, keep: bool = True) -> Tensor:
        """The embeddings [P, D] of an image, encoded unless they are kept. From any thread. Raises UsageError."""
        key = image_digest(image)
        if (embeddings := self.images.get(key)) is not None:
            return embeddings
        if isinstance(image, Tensor):
            features = image[None]
        elif model.vision_encoder is None:
            raise UsageError("this model was loaded without its vision encoder")
        else:
            features = model.vision_encoder(torch.from_numpy(np.stack([image])).to(model.device))
        dtype = model.lm_head.weight.dtype
        embeddings = model.vision_proj(features.to(model.device, dtype)).to(dtype)[0]
        if keep:
            self.images.add(key, embeddings)
        return embeddings

    def recall(self, digests: Sequence[bytes], cache: KVCache) -> int:
        """Fill an empty cache with the kept ones of a prompt's first blocks; returns their number of tokens."""
        end = 0
        for digest in digests:
            if (block := self.prefixes.get(digest)) is None:
                break
            cache.keys[:, 0, :, end : end + BLOCK], cache.values[:, 0, :, end : end + BLOCK] = block
            end += BLOCK
        cache.rewind(end)
        return end

    def remember(self, digests: Sequence[bytes], cache: KVCache, start: int) -> None:
        """Keep those of a prompt's whole blocks that were read from `start`, a multiple of 64, on."""
        for number in range(start // BLOCK, min(len(digests), cache.used // BLOCK)):
            columns = slice(number * BLOCK, (number + 1) * BLOCK)
            if digests[number] not in self.prefixes:
                block = cache.keys[:, 0, :, columns], cache.values[:, 0, :, columns]
                self.prefixes.add(digests[number], torch.stack(block))  # [2, L, KV, 64, hd]


def image_digest(image: EncodedImage) -> bytes:
    """An image's name by its content."""
    array = image.detach().float().cpu().numpy() if isinstance(image, Tensor) else image
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=SIZE).digest()


def block_digests(input_ids: list[int], image_mask: list[bool], images: Sequence[EncodedImage]) -> list[bytes]:
    """Of each whole block of a prompt with these images, in reading order: a digest of all tokens up to its end."""
    names = [id.to_bytes(SIZE, "little") for id in input_ids]
    patches = [at for at, patch in enumerate(image_mask) if patch]
    image_names = [image_digest(image) for image in images]
    for order, at in enumerate(patches):
        names[at] = image_names[order * len(images) // len(patches)]
    digests = [b""]
    for end in range(BLOCK, len(names) + 1, BLOCK):
        content = b"".join((digests[-1], *names[end - BLOCK : end]))
        digests.append(hashlib.blake2b(content, digest_size=SIZE).digest())
    return digests[1:]


# --- one per model ----------------------------------------------------------------------------------------------------

_MAKING = Lock()
_READY: WeakKeyDictionary[nn.Module, tuple[object, PromptCache]] = WeakKeyDictionary()


def ready(model: VLM) -> PromptCache:
    """The caches of a model, made again only after its weights have changed."""
    weights = [*model.model.parameters(), *model.vision_proj.parameters()]
    state = id(model.vision_encoder), state_of(weights)
    with _MAKING:
        entry = _READY.get(model)
        if entry is None or entry[0] != state:
            entry = _READY[model] = state, PromptCache(model)
        return entry[1]
