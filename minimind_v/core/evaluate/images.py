"""The images of an evaluation, each decoded and encoded once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from minimind_v.core.data.feature_cache import FeatureEncoder
from minimind_v.core.data.feature_store import FeatureStore
from minimind_v.core.data.images import blank_pixels, load_pixels
from minimind_v.core.evaluate.benchmarks import read_picture
from minimind_v.core.evaluate.measure import BLANK_IMAGE, Source
from minimind_v.core.model.vlm import VLM
from minimind_v.core.rows.row import RowStore

PIXELS = 256 * 2**20  # bytes of decoded images that wait to be encoded


class Images:
    """The images of an evaluation: decoded when their question is read, encoded when it is asked.

    Pixels are kept between the two, up to a limit; beyond it an image is decoded twice.
    """

    def __init__(self, model: VLM, dtype: str, store: FeatureStore | None) -> None:
        """`store` has features that were encoded before."""
        vision_encoder = model.vision_encoder
        assert vision_encoder is not None, "a loaded model has one"
        self._device, self._spec = model.device, model.spec
        self._encoder = FeatureEncoder(vision_encoder, self._device, dtype)
        self._store = store
        self._pixels: dict[str, np.ndarray] = {}  # uint8 [3, S, S] each
        self._bytes = 0

    def decode(self, digest: str, data: bytes, name: str) -> None:
        """Decode a picture file. Raises RowError."""
        pixels = self._load(data, name)
        if self._bytes + pixels.nbytes <= PIXELS:
            self._pixels[digest] = pixels
            self._bytes += pixels.nbytes

    def encode(self, digest: str, rows: RowStore, sources: Mapping[str, Source]) -> Tensor:
        """The features [P, width] of an image; a training run may have stored them."""
        if digest != BLANK_IMAGE and self._store is not None:
            stored = self._store.read(bytes.fromhex(digest))
            if stored is not None:
                return stored.to(self._device)
        is_blank = digest == BLANK_IMAGE
        pixels = blank_pixels(self._spec.preparation[0]) if is_blank else self.pixels(digest, rows, sources)
        images = torch.from_numpy(np.stack([pixels])).to(self._device)  # [1, 3, S, S]
        return self._encoder.encode(images)[0]

    def pixels(self, digest: str, rows: RowStore, sources: Mapping[str, Source]) -> np.ndarray:
        """The pixels of an image, uint8 [3, S, S]. Raises RowError for one that has become unreadable."""
        if (pixels := self._pixels.get(digest)) is not None:
            return pixels
        index, position, name = sources[digest]
        return self._load(read_picture(rows, rows.row(index), index, position, name), name)

    def _load(self, data: bytes, name: str) -> np.ndarray:
        return load_pixels(data, name, *self._spec.preparation)
