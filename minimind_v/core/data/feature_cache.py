"""The feature cache: an image is encoded once and then read from disk, since a frozen encoder's features never change.

Data workers read an image's features from the store before they decode it. The trainer encodes missing images in groups
of one size and stores their features. So features do not depend on the other images of a batch, and training is the
same to the last bit whether features were computed or read (on a GPU: with deterministic algorithms only).
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_layout import FeatureLayout
from minimind_v.core.data.feature_store import FeatureStore, measure_reading
from minimind_v.core.data.feature_writer import FeatureWriter
from minimind_v.core.data.images import RENDERING
from minimind_v.core.device import autocast, wait_for
from minimind_v.core.model.vision.encoder import VisionEncoder

# Images that are encoded together. One image fits into a CPU's cache; for GPUs the number was not measured.
GROUP = {"cpu": 1, "cuda": 32}
GROUP_ELSEWHERE = 16
TIMED = 8  # groups in a row that measure a GPU, which begins one before the host has asked for the last
WORTH = 2  # encoding an image must take at least so many times as long as reading its features
PROBES = 4  # fewer images are not worth a folder


class FeatureEncoder:
    """Encodes the images of batches; the features of an image depend on that image only.

    On a GPU this holds to the last bit with deterministic algorithms only; without them, groups may have any size.
    """

    def __init__(self, encoder: VisionEncoder, device: torch.device, dtype: str) -> None:
        self.encoder, self.device, self.dtype = encoder, device, dtype
        self.group = GROUP.get(device.type, GROUP_ELSEWHERE)
        with autocast(device, dtype):
            lower = torch.is_autocast_enabled(device.type)
        self.kind = "bfloat16" if lower else "float32"  # the projector's input

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Images [K, 3, S, S], uint8 → features [K, P, width], without a gradient."""
        return torch.cat([self._encode_group(group) for group in pixel_values.split(self.group)])

    def _encode_group(self, images: Tensor) -> Tensor:
        """One group, filled up if bits must be the same: the number of images can change the kernel and its sums."""
        count = len(images)
        exact = self.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        if count < self.group and exact:
            images = images[torch.arange(self.group, device=images.device) % count]
        with torch.inference_mode(), autocast(self.device, self.dtype):
            features = self.encoder(images)[:count]
        return features.to(torch.bfloat16 if self.kind == "bfloat16" else torch.float32)

    def identify(self) -> tuple[str, float]:
        """A name that no other encoder has, and the seconds per image that is encoded, groups in a row.

        The name depends on weights, preprocessing and the features of some images on this machine: the bits differ
        between machines, precisions and releases, and features with other bits must not be used.
        """
        size = self.encoder.spec.image_size
        noise = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (self.group, 3, size, size), dtype=torch.uint8, generator=noise)
        images = images.to(self.device)
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(self.encoder.state_dict().items()):
            checksum = zlib.crc32(tensor.detach().float().cpu().contiguous().numpy())
            digest.update(f"{name} {tuple(tensor.shape)} {checksum};".encode())
        digest.update(f"{self.encoder.spec.identity} {RENDERING}".encode())
        digest.update(self.encode(images).float().cpu().numpy().tobytes())  # and warm up
        groups = TIMED if self.device.type == "cuda" else 1
        begun = time.perf_counter()
        for _ in range(groups):
            self.encode(images)
        wait_for(self.device)
        seconds = (time.perf_counter() - begun) / (groups * self.group)
        return digest.hexdigest(), seconds


class FeatureCache:
    """The features of a run's images: read if they are stored, else encoded and stored."""

    def __init__(
        self,
        encoder: FeatureEncoder | None = None,
        store: FeatureStore | None = None,
        layout: FeatureLayout | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        """`layout` is a layout that loses precision: it rounds the features of every image, stored or not."""
        self.encoder, self.store, self.layout, self.warn = encoder, store, layout, warn
        threaded = encoder is not None and encoder.device.type == "cuda"
        self.writer = FeatureWriter(store, warn, threaded) if store is not None else None
        self.encoded = 0  # images

    def features(self, batch: Batch) -> Tensor | None:
        """Features of a batch's images on the device, in reading order [M, P, width]; None if it has none."""
        if batch.pixel_values is None:
            return batch.image_features
        return self.merged(batch, self._of_pixels(batch.pixel_values, batch.keys))

    def merged(self, batch: Batch, encoded: Tensor) -> Tensor:
        """The stored features of a batch and those of its pixels, in reading order [M, P, width]."""
        if batch.image_features is None:
            return encoded
        assert batch.image_order is not None
        overlapping = encoded.device.type == "cuda"
        stored = batch.image_features.to(encoded, non_blocking=overlapping)
        order = batch.image_order.to(encoded.device, non_blocking=overlapping)
        return torch.cat((stored, encoded)).index_select(0, order)

    def _of_pixels(self, pixel_values: Tensor, keys: list[bytes]) -> Tensor:
        """Features of images that had none in the store when a data worker read ahead; some may be stored by now."""
        stored = {n: features for n, key in enumerate(keys) if (features := self._read(key)) is not None}
        missing = [n for n in range(len(pixel_values)) if n not in stored]
        if not missing:
            return torch.stack(list(stored.values())).to(pixel_values.device)
        assert self.encoder is not None, "pixels need an encoder"
        fresh = self.encoder.encode(pixel_values[missing] if stored else pixel_values)  # [K, P, width]
        fresh = self.keep([keys[n] for n in missing], fresh)
        if not stored:
            return fresh
        features = fresh.new_empty(len(pixel_values), *fresh.shape[1:])
        features[missing] = fresh
        features[list(stored)] = torch.stack(list(stored.values())).to(fresh)
        return features

    def _read(self, key: bytes) -> Tensor | None:
        return self.store.read(key) if self.store is not None else None

    def keep(self, keys: list[bytes], encoded: Tensor) -> Tensor:
        """Store the features of images that were encoded now [K, P, width]; returns them as they will be read."""
        self.encoded += len(encoded)
        features = encoded if self.layout is None else self.layout.rounded(encoded)
        if self.writer is not None:
            self.writer.write(keys, features)
        return features

    def flush(self) -> None:
        """Wait until all features are stored, or cannot be."""
        if self.writer is not None:
            self.writer.flush()


def open_feature_cache(
    choice: str,
    folder: Path,
    encoder: FeatureEncoder,
    rows: int,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    readers: int = 1,
) -> FeatureCache:
    """The cache, below `folder`, of a run over `rows` rows; `choice` is off, auto, exact or int8.

    `say` gets the decision in one line. `auto` is `exact` if reading features, by so many readers at once, takes at
    most half as long as computing them, by measurement, else off; neither changes a bit of the trained weights.
    """
    spec = encoder.encoder.spec
    layout = FeatureLayout("int8" if choice == "int8" else encoder.kind, spec.tokens_per_image, spec.width)
    if choice == "off":
        return FeatureCache(encoder, warn=warn)
    name, encoding = encoder.identify()
    store = FeatureStore.below(folder, f"{name}-{layout.kind}", layout)
    room = store.budget // layout.record
    if choice == "auto":
        reading = measure_reading(store.folder.parent, layout.record, readers) if room >= PROBES else None
        if reading is None or reading * WORTH > encoding:
            why = f"reading an image's takes {(reading or 0) * 1e3:.2g} ms, encoding it {encoding * 1e3:.2g} ms"
            say(f"features: not cached ({f'no disk space in {folder}' if reading is None else why})")
            return FeatureCache(encoder, warn=warn)
    line = f"features: cached as {layout.kind} in {store.folder}, {layout.record / 1e3:.0f} kB an image; "
    line += f"{store.count():,} cached, room for {room:,}"
    if room < rows and choice != "int8":
        line += f" of the images of {rows:,} rows (--features int8: {room * layout.record // layout.eighth:,})"
    say(line)
    return FeatureCache(encoder, store, layout if choice == "int8" else None, warn)
