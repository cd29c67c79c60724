"""The vision encoder as a stage of its own: beside a step on a GPU, the images of later steps are encoded.

Images of several steps go into one group, so every group is full, however few images a step has: a smaller one would
use a GPU badly, or would have to be filled up where bits must be the same. The groups are launched on a stream of their
own, as a CUDA graph, and a step is handed out when the group after its last one has been launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minimind_v.core.cuda_graph import CudaGraphs, Record, own_stream, record_cuda
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureCache, FeatureEncoder

AHEAD = 32  # steps that are held at most: where few rows have images, a group is launched before it is full


def encode_ahead(steps: Iterator[list[Batch] | None], cache: FeatureCache) -> Iterator[list[Batch] | None]:
    """Steps in their order, on CUDA with features in place of pixels; elsewhere they stay as they are.

    None ends them.
    """
    if cache.encoder is None or cache.encoder.device.type != "cuda":
        return steps
    return VisionStage(cache, cache.encoder).steps(steps)


@dataclass
class _Images:
    """The images of a batch that wait, and the features of those that do not."""

    pixel_values: Tensor  # uint8 [K, 3, S, S]
    keys: list[bytes]
    features: list[tuple[Tensor, torch.cuda.Event | None]]  # [k, P, width] each, and when they are computed


@dataclass
class _Step:
    batches: list[Batch] | None
    images: dict[int, _Images]  # by the number of the batch
    end: int  # images that were taken up to this step


class VisionStage:
    """Encodes the images of steps before these begin; the current stream never waits for the group of a later step."""

    def __init__(self, cache: FeatureCache, encoder: FeatureEncoder, record: Record = record_cuda) -> None:
        self.cache, self.encoder = cache, encoder
        self._stream = None  # where only tests run this
        if encoder.device.type == "cuda":  # it begins after what is launched so far
            self._stream = own_stream(self, encoder.device)
            self._stream.wait_stream(torch.cuda.current_stream(encoder.device))
        self.graphs = CudaGraphs(encoder.device, "images are encoded", cache.warn, 0.0, record)
        self._pixels = self._features = torch.empty(0)  # of a group, in memory that stays
        self._waiting: deque[_Images] = deque()
        # Features that the current stream reads, until the event: freed earlier, the side stream would overwrite them.
        self._read: deque[tuple[torch.cuda.Event, list[tuple[Tensor, torch.cuda.Event | None]]]] = deque()
        self._taken = self._launched = 0  # images

    def steps(self, steps: Iterator[list[Batch] | None]) -> Iterator[list[Batch] | None]:
        """The steps with features in place of pixels, up to the first None."""
        queue: deque[_Step] = deque()
        for batches in steps:
            queue.append(self._take(batches))
            while self._taken - self._launched >= self.encoder.group:
                self._launch()
            while queue and (self._is_ahead(queue[0]) or len(queue) > AHEAD):
                yield self._hand_out(queue.popleft())
            if batches is None:
                break
        while queue:
            yield self._hand_out(queue.popleft())

    def _is_ahead(self, step: _Step) -> bool:
        """Whether a group is launched beyond those of a step."""
        return not step.images or step.end <= self._launched - self.encoder.group

    def _take(self, batches: list[Batch] | None) -> _Step:
        images = {
            number: _Images(batch.pixel_values, batch.keys, [])
            for number, batch in enumerate(batches or ())
            if batch.pixel_values is not None and batch.supervised  # nothing is computed of other batches
        }
        self._waiting += images.values()
        self._taken += sum(len(each.keys) for each in images.values())
        return _Step(batches, images, self._taken)

    def _hand_out(self, step: _Step) -> list[Batch] | None:
        if step.batches is None:
            return None
        while step.images and self._launched < step.end:
            self._launch()
        batches = list(step.batches)
        for number, images in step.images.items():
            encoded = self._on_current_stream(images)  # [K, P, width]
            batch = batches[number]
            features = self.cache.merged(batch, encoded)  # [M, P, width]
            batches[number] = replace(batch, pixel_values=None, image_features=features, image_order=None, keys=[])
        return batches

    def _on_current_stream(self, images: _Images) -> Tensor:
        """The features of a batch, once the current stream has waited for them, in memory of that stream."""
        if self._stream is None:
            return torch.cat([features for features, _ in images.features])
        current = torch.cuda.current_stream(self.encoder.device)
        for _, computed in images.features:
            if computed is not None:
                current.wait_event(computed)
        encoded = torch.cat([features for features, _ in images.features])
        self._read.append((current.record_event(), images.features))
        return encoded

    def _launch(self) -> None:
        """Begin to encode the images that wait, up to a group."""
        while self._read and self._read[0][0].query():
            self._read.popleft()
        keys: list[bytes] = []
        owners, counts = list[_Images](), list[int]()  # of the pieces of the group
        with self._beside():
            while self._waiting and len(keys) < self.encoder.group:
                images = self._waiting[0]
                count = min(len(images.keys), self.encoder.group - len(keys))
                self._put(len(keys), images.pixel_values[:count])
                keys += images.keys[:count]
                owners.append(images)
                counts.append(count)
                images.pixel_values, images.keys = images.pixel_values[count:], images.keys[count:]
                if not images.keys:
                    self._waiting.popleft()
            features = self.cache.keep(keys, self._encode(len(keys)))  # [K, P, width]
            computed = self._stream.record_event() if self._stream else None
        for images, piece in zip(owners, features.split(counts), strict=True):
            images.features.append((piece, computed))
        self._launched += len(keys)

    def _beside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _put(self, position: int, pixel_values: Tensor) -> None:
        """Copy images [K, 3, S, S] into the group."""
        if not len(self._pixels):
            shape = self.encoder.group, *pixel_values.shape[1:]
            self._pixels = pixel_values.new_empty(shape, device=self.encoder.device)
        self._pixels[position : position + len(pixel_values)].copy_(pixel_values, non_blocking=True)

    def _encode(self, count: int) -> Tensor:
        """Features of the first `count` images of the group [K, P, width]."""
        if count < len(self._pixels):
            return self.encoder.encode(self._pixels[:count])
        self.graphs.run(count, self._encode_group, [self._features])
        return self._features.clone()

    def _encode_group(self) -> None:
        features = self.encoder.encode(self._pixels)
        if not len(self._features):
            self._features = torch.empty_like(features)
        self._features.copy_(features)
