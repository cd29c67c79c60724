"""Examples collated into tensors and padded to the longest example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind_v.core.data.dataset import BrokenRow, Example, LoadedImage
from minimind_v.core.model.loss import IGNORE, supervised

TOKENS = ("input_ids", "attention_mask", "image_mask", "labels")  # [B, T] each
POSITIONS = ("image_positions", "supervised_positions", "targets")


@dataclass(frozen=True)
class Batch:
    """B rows of up to T tokens, with M images in reading order."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T], true for tokens
    labels: Tensor  # [B, T], -100 where not supervised
    image_mask: Tensor  # [B, T], true for placeholders of patches
    pixel_values: Tensor | None = None  # uint8 [images without stored features, 3, S, S]
    image_features: Tensor | None = None  # [images with stored features, P, width]
    image_order: Tensor | None = None  # [M], of each image among image_features and then pixel_values, if both exist
    keys: list[bytes] = field(default_factory=list)  # of the images in pixel_values, to store their features
    locations: list[str] = field(default_factory=list)  # file:row of each row
    broken: list[BrokenRow] = field(default_factory=list)  # rows that were left out of this batch
    answers: int = 0
    answers_cut: int = 0  # how many of these were cut short or cut off
    text_rows: int = 0  # rows with pictures and no mark
    notes: dict[str, int] = field(default_factory=dict)  # rows by how their reading differs from their text
    trouble: str = ""  # a worker's warning, for the trainer to report
    # What image_mask and labels say, worked out beforehand so that a GPU need not be asked; None: the model does it.
    image_positions: Tensor | None = None  # [M · P], of the placeholders in the flattened batch
    supervised_positions: Tensor | None = None  # [S], whose next token is supervised
    targets: Tensor | None = None  # [S], these next tokens

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def supervised(self) -> int:
        """Supervised tokens. The first position of a row does not count: no token before it predicts it."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    @property
    def images(self) -> int:
        """Images, as pixels or features."""
        return sum(len(images) for images in (self.pixel_values, self.image_features) if images is not None)

    @property
    def tokens(self) -> dict[str, Any]:
        """The arguments of the model's forward besides the images."""
        return {name: getattr(self, name) for name in (*TOKENS, *POSITIONS)}

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; a copy from pinned memory to CUDA overlaps with computing.

        An overlapping copy to MPS may read memory that was freed and used again meanwhile.
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def split(self, positions: int) -> list[Batch]:
        """Pieces of consecutive rows, each of at most `positions` or of one row, and as wide as its longest row.

        The images must be features already.
        """
        lengths = self.attention_mask.sum(dim=1).clamp(min=1).tolist()

        def within_limit(begin: int, end: int) -> bool:
            return end - begin == 1 or (end - begin) * max(lengths[begin:end]) <= positions

        edges = [0]
        for row in range(1, len(self)):
            if not within_limit(edges[-1], row + 1):
                edges.append(row)
        even = [len(self) * number // len(edges) for number in range(len(edges))]  # avoids a last piece of few rows
        if all(within_limit(begin, end) for begin, end in pairwise([*even, len(self)])):
            edges = even
        pieces, first = [], 0
        images = 0 if self.image_features is None else len(self.image_features)
        per_image = max(1, int(self.image_mask.sum()) // max(images, 1))  # placeholders
        for begin, end in pairwise([*edges, len(self)]):
            wide = max(lengths[begin:end])
            cut: dict[str, Any] = {name: getattr(self, name)[begin:end, :wide] for name in TOKENS}
            if self.image_features is not None and images:
                last = first + int(cut["image_mask"].sum()) // per_image
                cut["image_features"] = self.image_features[first:last]
                first = last
            pieces.append(Batch(**cut))
        return pieces

    def pin_memory(self) -> Batch:
        """torch's DataLoader calls this for transfers to a CUDA device."""
        return self._map(lambda tensor: tensor.pin_memory() if tensor.numel() else tensor)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {
            n: function(value) for n, value in self.__dict__.items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def collate(examples: list[Example], broken: list[BrokenRow], pad_id: int) -> Batch:
    """Right-pad examples into a batch; no examples give a batch of no rows.

    Raises ValueError if the placeholders of a row do not fit its images.
    """
    length = max((len(example.tokens) for example in examples), default=0)
    shape = (len(examples), length)
    input_ids = np.full(shape, pad_id, np.int64)
    attention_mask, image_mask, loss_mask = (np.zeros(shape, bool) for _ in range(3))
    for row, example in enumerate(examples):
        tokens, end = example.tokens, len(example.tokens)
        input_ids[row, :end] = tokens.input_ids
        attention_mask[row, :end] = True
        image_mask[row, :end] = tokens.image_mask
        loss_mask[row, :end] = tokens.loss_mask
    labels = torch.from_numpy(np.where(loss_mask, input_ids, IGNORE))
    supervised_positions, targets = supervised(labels)
    images = [image for example in examples for image in example.images]
    placeholders = image_mask.sum(axis=1)
    if images and any(placeholders * len(images) != [len(row.images) * placeholders.sum() for row in examples]):
        rows = zip(examples, placeholders.tolist(), strict=True)
        counts = ", ".join(f"{row.location}: {count} for {len(row.images)}" for row, count in rows)
        raise ValueError(f"the placeholders do not fit the images: {counts}")
    pixels = [image.pixels for image in images if image.pixels is not None]
    features = [image.features for image in images if image.features is not None]
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(attention_mask),
        labels,
        torch.from_numpy(image_mask),
        _stack(pixels, torch.uint8) if pixels else None,
        _stack(features, features[0].dtype) if features else None,
        _order(images) if pixels and features else None,
        [image.key for image in images if image.pixels is not None],
        locations=[example.location for example in examples],
        broken=broken,
        answers=sum(example.tokens.answers for example in examples),
        answers_cut=sum(example.tokens.answers_cut for example in examples),
        text_rows=sum(example.tokens.unmarked > 0 for example in examples),
        notes=dict(Counter(note for example in examples for note in example.tokens.notes)),
        image_positions=torch.from_numpy(image_mask.ravel().nonzero()[0]),
        supervised_positions=supervised_positions,
        targets=targets,
    )


def _order(images: Sequence[LoadedImage]) -> Tensor:
    """The place of each image among those with features and then those with pixels, [M]."""
    decoded = np.array([image.pixels is not None for image in images])
    return torch.from_numpy(decoded.argsort(kind="stable").argsort(kind="stable"))


def _stack(arrays: Sequence[Tensor | np.ndarray], kind: torch.dtype) -> Tensor:
    """Pictures [M, …] in one tensor."""
    stacked = torch.empty((len(arrays), *arrays[0].shape), dtype=kind)
    for number, array in enumerate(arrays):
        if isinstance(array, Tensor):
            stacked[number] = array
        else:
            stacked[number].numpy()[:] = array
    return stacked
