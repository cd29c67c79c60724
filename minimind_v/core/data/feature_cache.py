"""Pictures that were looked at once are remembered: a frozen CLIP always finds the same in them.

Data workers ask the store for the features of a picture before they decode it. The trainer looks at those that are
missing, always in groups of one size, and stores what it found. So a picture's features do not depend on the pictures
beside it, and training is the same to the last bit whether they were computed or read (on a GPU: with
deterministic algorithms only).
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

# Pictures that are looked at together. A CPU has them one by one in its cache; of a GPU this number was not measured.
GROUP = {"cpu": 1}
GROUP_ELSEWHERE = 16
WORTH = 2  # looking at a picture must take so many times as long as reading it
PROBES = 4  # fewer pictures are not worth a folder


class FeatureEncoder:
    """Looks at the pictures of batches; what it returns for one depends on nothing but the picture.

    On a GPU that is so to the last bit only where algorithms are deterministic: else groups may have any size, since
    what is learnt from them differs in the last bits anyway.
    """

    def __init__(self, encoder: VisionEncoder, device: torch.device, dtype: str) -> None:
        self.encoder, self.device, self.dtype = encoder, device, dtype
        self.group = GROUP.get(device.type, GROUP_ELSEWHERE)
        with autocast(device, dtype):
            lower = torch.is_autocast_enabled(device.type)
        self.kind = "bfloat16" if lower else "float32"  # as which the projector will read them

    def look(self, pixel_values: Tensor) -> Tensor:
        """Pictures [K, 3, S, S], uint8 → features [K, P, width], without a gradient."""
        return torch.cat([self._look(part) for part in pixel_values.split(self.group)])

    def _look(self, pictures: Tensor) -> Tensor:
        """One group. A kernel may be chosen by the number of pictures, and add up in another order than its like.

        So a group that is not full is filled up where bits must be the same.
        """
        count = len(pictures)
        exact = self.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        if count == self.group or not exact:
            return self._encode(pictures)
        return self._encode(pictures[torch.arange(self.group) % count])[:count]

    def _encode(self, pictures: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(self.device, self.dtype):
            found = self.encoder(pictures)
        kind = torch.bfloat16 if self.kind == "bfloat16" else torch.float32
        return found.to(kind)

    def prove(self) -> tuple[str, float]:
        """What tells this eye from any other, and the seconds that it needs for a picture.

        Weights, preprocessing, and what the tower makes of some pictures here: the bits differ between machines,
        precisions and releases, and features that would not be computed so are not used.
        """
        size = self.encoder.spec.image_size
        noise = torch.Generator().manual_seed(0)
        pictures = torch.randint(0, 256, (self.group, 3, size, size), dtype=torch.uint8, generator=noise)
        pictures = pictures.to(self.device)
        told = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(self.encoder.state_dict().items()):
            sum_ = zlib.crc32(tensor.detach().float().cpu().contiguous().numpy())
            told.update(f"{name} {tuple(tensor.shape)} {sum_};".encode())
        told.update(f"{self.encoder.spec.identity} {RENDERING}".encode())
        self.look(pictures)  # the first time pays for what is only made once
        begun = time.perf_counter()
        seen = self.look(pictures).float().cpu()
        seconds = (time.perf_counter() - begun) / self.group
        told.update(seen.numpy().tobytes())
        return told.hexdigest(), seconds


class FeatureCache:
    """The features of a run's pictures: read where they are remembered, computed and remembered where not."""

    def __init__(
        self,
        eye: FeatureEncoder | None = None,
        store: FeatureStore | None = None,
        form: Form | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        """`form` is one that loses something; what it leaves is used for every picture, stored or not."""
        self.eye, self.store, self.form, self.warn = eye, store, form, warn
        self.looked = self.read = 0  # pictures

    def features(self, batch: Batch) -> Tensor | None:
        """Features of all pictures of a batch on the device, in reading order [M, P, width]; None without any."""
        if batch.pixel_values is None:
            self.read += 0 if batch.image_features is None else len(batch.image_features)
            return batch.image_features
        seen = self._see(batch.pixel_values, batch.keys)
        if batch.image_features is None:
            return seen
        self.read += len(batch.image_features)
        assert batch.remembered is not None
        found = seen.new_empty(len(batch.remembered), *seen.shape[1:])  # [M, P, width]
        found[batch.remembered] = batch.image_features
        found[~batch.remembered] = seen
        return found

    def _see(self, pixel_values: Tensor, keys: list[bytes]) -> Tensor:
        """What is in pictures that a data worker did not find. It reads ahead: they may be there by now."""
        known = {n: found for n, key in enumerate(keys) if (found := self._recall(key)) is not None}
        missing = [n for n in range(len(pixel_values)) if n not in known]
        self.read += len(known)
        self.looked += len(missing)
        if not missing:
            return torch.stack(list(known.values())).to(pixel_values.device)
        assert self.eye is not None, "pictures need an eye"
        fresh = self.eye.look(pixel_values[missing] if known else pixel_values)  # [K, P, width]
        if self.form is not None:
            fresh = self.form.settle(fresh)
        self._remember([keys[n] for n in missing], fresh)
        if not known:
            return fresh
        found = fresh.new_empty(len(pixel_values), *fresh.shape[1:])
        found[missing] = fresh
        found[list(known)] = torch.stack(list(known.values())).to(fresh)
        return found

    def _recall(self, key: bytes) -> Tensor | None:
        return self.store.read(key) if self.store is not None else None

    def _remember(self, keys: list[bytes], features: Tensor) -> None:
        if self.store is None or self.store.trouble:
            return
        self.store.write(keys, features.cpu())
        if self.store.trouble:
            self.warn(f"no more pictures are remembered: {self.store.trouble}")


def open_feature_cache(
    choice: str, folder: Path, eye: FeatureEncoder, rows: int, say: Callable[[str], None], warn: Callable[[str], None]
) -> FeatureCache:
    """What a run over so many rows remembers, below `folder`; `choice` is off, auto, exact or int8.

    Says in one line what was decided. `auto` is `exact` where reading features was measured to take at most half as
    long as computing them, else off; neither changes a bit of what is learnt.
    """
    spec = eye.encoder.spec
    form = Form("int8" if choice == "int8" else eye.kind, spec.tokens_per_image, spec.width)
    if choice == "off":
        return FeatureCache(eye)
    name, looking = eye.prove()
    store = FeatureStore.below(folder, f"{name}-{form.kind}", form)
    kept = form if choice == "int8" else None
    room = store.budget // form.record
    if choice == "auto":
        reading = measure_reading(store.folder.parent, form.record) if room >= PROBES else None
        if reading is None or reading * WORTH > looking:
            why = (
                f"no room in {folder}"
                if reading is None
                else f"reading one takes {reading * 1e3:.2g} ms, looking {looking * 1e3:.2g} ms"
            )
            say(f"features: not remembered ({why})")
            return FeatureCache(eye)
    told = f"features: remembered as {form.kind} in {store.folder}, {form.record / 1e3:.0f} kB a picture; "
    told += f"{store.count():,} are there, room for {room:,}"
    if room < rows and choice != "int8":
        told += f" of the pictures of {rows:,} rows (--features int8: {room * form.record // form.eighth:,})"
    say(told)
    return FeatureCache(eye, store, kept, warn)
