"""The feature cache: an image that was encoded once is read from disk, since a frozen encoder's features never change.

Data workers ask the store for the features of an image before they decode it. The trainer encodes those that are
missing, always in groups of one size, and stores the features. So an image's features do not depend on the images
beside it, and training is the same to the last bit whether they were computed or read (on a GPU: with deterministic
algorithms only).
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
from minimind_v.core.data.feature_layout import Form
from minimind_v.core.data.feature_store import FeatureStore, measure_reading
from minimind_v.core.data.images import RENDERING
from minimind_v.core.device import autocast
from minimind_v.core.model.vision.encoder import VisionEncoder

# Images that are encoded together. A CPU has them one by one in its cache; of a GPU this number was not measured.
GROUP = {"cpu": 1}
GROUP_ELSEWHERE = 16
WORTH = 2  # encoding an image must take so many times as long as reading its features
PROBES = 4  # fewer images are not worth a folder


class FeatureEncoder:
    """Encodes the images of batches; the features of an image depend on nothing but the image.

    On a GPU that is so to the last bit only where algorithms are deterministic: else groups may have any size, since
    what is learnt from them differs in the last bits anyway.
    """

    def __init__(self, encoder: VisionEncoder, device: torch.device, dtype: str) -> None:
        self.encoder, self.device, self.dtype = encoder, device, dtype
        self.group = GROUP.get(device.type, GROUP_ELSEWHERE)
        with autocast(device, dtype):
            lower = torch.is_autocast_enabled(device.type)
        self.kind = "bfloat16" if lower else "float32"  # as which the projector will read them

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Images [K, 3, S, S], uint8 → features [K, P, width], without a gradient."""
        return torch.cat([self._encode_group(group) for group in pixel_values.split(self.group)])

    def _encode_group(self, images: Tensor) -> Tensor:
        """One group. A kernel may be chosen by the number of images, and add up in another order than its like.

        So a group that is not full is filled up where bits must be the same.
        """
        count = len(images)
        exact = self.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        if count < self.group and exact:
            images = images[torch.arange(self.group) % count]
        with torch.inference_mode(), autocast(self.device, self.dtype):
            features = self.encoder(images)[:count]
        return features.to(torch.bfloat16 if self.kind == "bfloat16" else torch.float32)

    def identify(self) -> tuple[str, float]:
        """A name that no other encoder has, and the seconds that this one needs for an image.

        Weights, preprocessing, and the features of some images here: the bits differ between machines, precisions and
        releases, and features that would not be computed so are not used.
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
        self.encode(images)  # the first time pays for what is only made once
        begun = time.perf_counter()
        features = self.encode(images).float().cpu()
        seconds = (time.perf_counter() - begun) / self.group
        digest.update(features.numpy().tobytes())
        return digest.hexdigest(), seconds


class FeatureCache:
    """The features of a run's images: read where they are stored, encoded and stored where not."""

    def __init__(
        self,
        encoder: FeatureEncoder | None = None,
        store: FeatureStore | None = None,
        form: Form | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        """`form` is one that loses precision; features rounded by it are used for every image, stored or not."""
        self.encoder, self.store, self.form, self.warn = encoder, store, form, warn
        self.encoded = self.read = 0  # images

    def features(self, batch: Batch) -> Tensor | None:
        """Features of all images of a batch on the device, in reading order [M, P, width]; None without any."""
        if batch.pixel_values is None:
            self.read += 0 if batch.image_features is None else len(batch.image_features)
            return batch.image_features
        encoded = self._of_pixels(batch.pixel_values, batch.keys)
        if batch.image_features is None:
            return encoded
        self.read += len(batch.image_features)
        assert batch.remembered is not None
        features = encoded.new_empty(len(batch.remembered), *encoded.shape[1:])  # [M, P, width]
        features[batch.remembered] = batch.image_features
        features[~batch.remembered] = encoded
        return features

    def _of_pixels(self, pixel_values: Tensor, keys: list[bytes]) -> Tensor:
        """Features of images that a data worker found none of. It reads ahead: some may be stored by now."""
        stored = {n: features for n, key in enumerate(keys) if (features := self._read(key)) is not None}
        missing = [n for n in range(len(pixel_values)) if n not in stored]
        self.read += len(stored)
        self.encoded += len(missing)
        if not missing:
            return torch.stack(list(stored.values())).to(pixel_values.device)
        assert self.encoder is not None, "pixels need an encoder"
        fresh = self.encoder.encode(pixel_values[missing] if stored else pixel_values)  # [K, P, width]
        if self.form is not None:
            fresh = self.form.settle(fresh)
        self._write([keys[n] for n in missing], fresh)
        if not stored:
            return fresh
        features = fresh.new_empty(len(pixel_values), *fresh.shape[1:])
        features[missing] = fresh
        features[list(stored)] = torch.stack(list(stored.values())).to(fresh)
        return features

    def _read(self, key: bytes) -> Tensor | None:
        return self.store.read(key) if self.store is not None else None

    def _write(self, keys: list[bytes], features: Tensor) -> None:
        if self.store is None or self.store.trouble:
            return
        self.store.write(keys, features.cpu())
        if self.store.trouble:
            self.warn(f"no more features are cached: {self.store.trouble}")


def open_feature_cache(
    choice: str,
    folder: Path,
    encoder: FeatureEncoder,
    rows: int,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> FeatureCache:
    """The cache of a run over so many rows, below `folder`; `choice` is off, auto, exact or int8.

    Says in one line what was decided. `auto` is `exact` where reading features was measured to take at most half as
    long as computing them, else off; neither changes a bit of what is learnt.
    """
    spec = encoder.encoder.spec
    form = Form("int8" if choice == "int8" else encoder.kind, spec.tokens_per_image, spec.width)
    if choice == "off":
        return FeatureCache(encoder)
    name, encoding = encoder.identify()
    store = FeatureStore.below(folder, f"{name}-{form.kind}", form)
    room = store.budget // form.record
    if choice == "auto":
        reading = measure_reading(store.folder.parent, form.record) if room >= PROBES else None
        if reading is None or reading * WORTH > encoding:
            why = f"reading an image's takes {(reading or 0) * 1e3:.2g} ms, encoding it {encoding * 1e3:.2g} ms"
            say(f"features: not cached ({f'no disk space in {folder}' if reading is None else why})")
            return FeatureCache(encoder)
    line = f"features: cached as {form.kind} in {store.folder}, {form.record / 1e3:.0f} kB an image; "
    line += f"{store.count():,} cached, room for {room:,}"
    if room < rows and choice != "int8":
        line += f" of the images of {rows:,} rows (--features int8: {room * form.record // form.eighth:,})"
    say(line)
    return FeatureCache(encoder, store, form if choice == "int8" else None, warn)
