"""Measure training steps over synthetic batches, for every forecast of time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minimind_v.core.config.freeze import FREEZE_POLICIES
from minimind_v.core.config.generation import V2025, V2026
from minimind_v.core.config.schema import CLIP_VISION, SIGLIP_VISION, RunConfig
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureCache, FeatureEncoder
from minimind_v.core.device import wait_for
from minimind_v.core.formats.vision_tower import load_encoder
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.loss import supervised as supervised_of
from minimind_v.core.model.vision.encoder import VisionEncoder, read_vision_spec
from minimind_v.core.model.vision.spec import read_tower_config
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.step import AdamW, TrainStep

PROBE = 2**22  # numbers that AdamW is measured with


class Trial:
    """The steps of a run by another model. It leaves the program's random numbers as they are."""

    def __init__(self, config: RunConfig, device: torch.device, light: bool = False) -> None:
        """With `light` it reads no weights, and all layers share their weights: the same work in little memory."""
        encoder = _random_encoder(config.vision_model) if light else load_encoder(config.vision_model)
        layers, few = config.model.num_hidden_layers, 3 if _first_is_apart(config) else 2
        built = replace(config.model, num_hidden_layers=min(layers, few)) if light else config.model
        with torch.random.fork_rng(devices=[]):
            model = VLM(built, encoder.spec, 0, encoder, config.projector).to(device)
        accelerate(model, device)
        vision = encoder.spec
        self.feature_bytes = 4 * vision.tokens_per_image * vision.width
        self.device, self.spec = device, model.spec  # with the tokens per image that leave the projector
        self.vocab_size = config.model.vocab_size
        self.length = min(config.data.max_length, config.model.max_position_embeddings)
        self.train_step = TrainStep(config, model, FeatureCache(FeatureEncoder(encoder, device, config.dtype)))
        stack, missing = model.model.layers, layers - built.num_hidden_layers
        middle = 1 if len(stack) == 3 else 0
        repeated = sum(parameter.numel() for parameter in stack[middle].parameters() if parameter.requires_grad)
        self.trainable = sum(parameter.numel() for parameter in self.train_step.trainable) + missing * repeated
        for _ in range(missing):
            stack.insert(middle, stack[middle])

    @property
    def moments(self) -> int:
        """Bytes that the optimiser will hold."""
        return sum(2 * parameter.nbytes for parameter in self.train_step.trainable)

    @property
    def row(self) -> int:
        """Bytes of a row of a batch with its image and features, without the model's activations."""
        return 18 * self.length + 3 * self.spec.image_size**2 + self.feature_bytes

    def __call__(self, rows: int) -> None:
        """Forward and backward over the largest possible rows. Raises torch's errors if memory is full."""
        self.passes(self.largest(rows))

    def largest(self, rows: int) -> Batch:
        """Rows of full length, with an image each, all supervised."""
        images = int(self.spec.tokens_per_image + 2 <= self.length)
        return self.batch([images] * rows, self.length, self.length - images * self.spec.tokens_per_image)

    def batch(self, images: list[int], length: int, supervised: int) -> Batch:
        """Rows of random tokens: `images` of each at the beginning, so many supervised tokens at the end."""
        draw, shape = torch.Generator().manual_seed(0), (len(images), length)
        ids = torch.randint(0, self.vocab_size, shape, generator=draw)
        image_mask = torch.arange(length) < torch.tensor(images)[:, None] * self.spec.tokens_per_image
        labels = torch.where(torch.arange(length) >= length - supervised, ids, IGNORE)
        size = (sum(images), 3, self.spec.image_size, self.spec.image_size)
        pixels = torch.zeros(size, dtype=torch.uint8) if sum(images) else None
        supervised_positions, targets = supervised_of(labels)
        return Batch(
            ids, torch.ones(shape, dtype=torch.bool), labels, image_mask, pixels, keys=[b""] * sum(images),
            image_positions=image_mask.flatten().nonzero()[:, 0], supervised_positions=supervised_positions,
            targets=targets,
        )  # fmt: skip

    def passes(self, batch: Batch) -> None:
        """Encode the images, then forward and backward."""
        self.train_step.backward([batch], batch.supervised, len(batch))
        self.train_step.optimiser.zero_grad(set_to_none=True)

    def adamw_seconds(self) -> float:
        """Seconds of AdamW for all trainable numbers, which take the same time each."""
        probe = torch.zeros(min(self.trainable, PROBE), device=self.device, requires_grad=True)
        probe.grad = torch.zeros_like(probe)
        optimiser = AdamW([probe], 0.0, self.device)
        optimiser.step()  # makes its state
        return seconds(self.device, optimiser.step) * self.trainable / len(probe)


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that a device needs for some work."""
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


def _first_is_apart(config: RunConfig) -> bool:
    """Whether a run trains other weights of the first layer than of the second."""
    trains, layers = FREEZE_POLICIES[config.freeze].trains, config.model.num_hidden_layers
    names = "self_attn.q_proj.weight", "mlp.gate_proj.weight"
    first, second = ([trains(f"model.layers.{number}.{name}", layers) for name in names] for number in (0, 1))
    return layers > 2 and first != second


def _random_encoder(folder: Path) -> VisionEncoder:
    """A vision encoder of the sizes in a folder's configuration, all of its layers the same random one.

    Without one in the standard folder it has the standard sizes: rows can be counted before the download.
    """
    standard = next((each.towers[0] for each in (V2025, V2026) if each.vision_model == folder), None)
    spec, (kind, config) = read_vision_spec(folder, standard), read_tower_config(folder, standard)
    if spec.model_type not in (CLIP_VISION, SIGLIP_VISION):
        return VisionEncoder(kind.build(config), spec)
    tower: Any = kind.build(replace(config, num_hidden_layers=1))
    stack = tower.encoder.layers
    stack.extend([stack[0]] * (config.num_hidden_layers - 1))
    return VisionEncoder(tower, spec)
