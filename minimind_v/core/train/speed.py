"""How long a recipe would take on this machine: measured on a few made-up rows with random weights."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.curate.stats import TypicalRow
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureEncoder
from minimind_v.core.device import autocast, gpu_names, has_fused_adamw, pick_device, wait_for
from minimind_v.core.model.decoder import AttentionContext
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vision.clip import ClipVision
from minimind_v.core.model.vision.encoder import VisionEncoder, VisionSpec, read_vision_spec
from minimind_v.core.model.vision.spec import read_config
from minimind_v.core.model.vlm import VLM
from minimind_v.core.paths import VISION_DIR
from minimind_v.core.train.freeze import freeze
from minimind_v.core.wording import plural

SECONDS = 4.0  # that the measured batch may take
CPU_TOKENS = 1024  # of the measured batch on a CPU, whose time per token is the same for more
GPU_TIMES = 5  # that a batch is measured on a GPU; the fastest counts
PROBE = 2**22  # numbers that an update is measured with


@dataclass(frozen=True)
class Estimate:
    """Seconds of a whole run, None where they could not be measured, and how that is known."""

    seconds: float | None
    how: str


def estimate(config: RunConfig, row: TypicalRow, rows: float, updates: int) -> Estimate:
    """Foretell a run over `rows` rows (all epochs together) in `updates` updates.

    A batch of the recipe's sizes, or as many of its rows as can be done in some seconds, goes forward and backward. No
    weights are read. Layers of one kind take the same time, so few are made: a whole model would be a gigabyte.
    """
    try:
        device = pick_device(config.device)
        eye = FeatureEncoder(_encoder(config.vision_model).to(device), device, config.dtype)
        spec = eye.encoder.spec
        measured = _Language(config, spec, device)
        length = min(max(round(row.length), 2), config.data.max_length)
        together = max(1, CPU_TOKENS // length) if device.type == "cpu" else config.data.batch_size

        def step(count: int) -> float:
            pictures = _pictures(row, count, length // spec.tokens_per_image)
            return _look(eye, sum(pictures)) + measured.step(row, pictures, length)

        alone = step(1)  # the first time pays for what is only made once
        alone = min(alone, step(1)) if alone < SECONDS else alone
        count = max(1, min(config.data.batch_size, together, int(SECONDS / alone)))
        # A GPU chooses its kernels when it meets new sizes, which a run does in a small part of its updates.
        again = GPU_TIMES if device.type == "cuda" else 1
        taken = min(step(count) for _ in range(again)) if count > 1 else alone
        update = measured.update()
    except torch.OutOfMemoryError:
        return Estimate(None, "not measured: a batch of this recipe does not fit into the device's memory")
    except Exception as error:  # an estimate must not end what has been counted
        return Estimate(None, f"not measured: {' '.join(str(error).split())[:200] or type(error).__name__}")
    where = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else gpu_names()[device.index or 0]
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1):
        where += ", which are busy with other work: left alone they may be many times as fast"
    return Estimate(
        taken / count * rows + update * updates,
        f"an estimate: {taken:.2f} s for {plural(count, 'made-up row')} of {length} tokens and "
        f"{row.pictures:.2g} pictures each, forward and backward with random weights, and {update:.3f} s "
        f"for an update, measured just now on {where}; reading, saving and what else runs are not in it",
    )


def time_of(config: RunConfig, row: TypicalRow, rows: float, updates: int) -> dict[str, Any]:
    """`estimate`, as a program reads it."""
    return asdict(estimate(config, row, rows, updates))


def _pictures(row: TypicalRow, rows: int, most: int) -> list[int]:
    """How many pictures each row has. Of 1.5 pictures a row: one and two in turn."""
    ends = [int(number * row.pictures) for number in range(rows + 1)]
    return [min(end - begin, most) for begin, end in pairwise(ends)]


def _encoder(folder: Path) -> VisionEncoder:
    """A vision tower of the sizes that a folder's configuration tells, all of its layers the same random one.

    Of the standard sizes where the standard folder has none: rows can be counted before a tower is there.
    """
    standard = folder == VISION_DIR
    spec, config = read_vision_spec(folder, standard), read_config(folder, standard)
    tower = ClipVision(replace(config, num_hidden_layers=1))
    stack: Any = tower.encoder.layers
    stack.extend([stack[0]] * (config.num_hidden_layers - 1))
    return VisionEncoder(tower, spec)


def _look(eye: FeatureEncoder, pictures: int) -> float:
    """Seconds for so many pictures, as a run encodes them."""
    if not pictures:
        return 0.0
    size = (pictures, 3, eye.encoder.spec.image_size, eye.encoder.spec.image_size)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8).to(eye.device)
    return _seconds(eye.device, lambda: eye.look(pixels))


class _Language:
    """A language model with two of its layers, the last and one of those that all others are like."""

    def __init__(self, config: RunConfig, spec: VisionSpec, device: torch.device) -> None:
        self.device, self.dtype = device, config.dtype
        whole = config.model.num_hidden_layers
        self.model = VLM(replace(config.model, num_hidden_layers=min(whole, 2)), spec, 0).to(device).train()
        learns = freeze(self.model, config.freeze)
        self.block, self.missing = self.model.model.layers[0], whole - min(whole, 2)
        here, more = (
            sum(one.numel() for one in some if one.requires_grad) for some in (learns, self.block.parameters())
        )
        self.learnt = here + self.missing * more

    def step(self, row: TypicalRow, pictures: list[int], length: int) -> float:
        """Seconds that the whole model takes for a batch of random ids and features, forward and backward."""
        patches, rows, model = self.model.spec.tokens_per_image, len(pictures), self.model
        input_ids = torch.randint(0, model.config.vocab_size, (rows, length))
        labels, answers = torch.full((rows, length), IGNORE), min(max(round(row.supervised), 1), length - 1)
        labels[:, length - answers :] = input_ids[:, length - answers :]
        image_mask = torch.arange(length) < torch.tensor(pictures)[:, None] * patches
        features = torch.randn(sum(pictures), patches, model.spec.width) if sum(pictures) else None
        batch = Batch(input_ids, torch.ones(rows, length, dtype=torch.bool), labels, image_mask, None, features)
        taken = _seconds(self.device, partial(self._learn, batch.to(self.device)))
        if self.missing:
            hidden = torch.randn(rows, length, model.config.hidden_size, device=self.device, requires_grad=True)
            taken += self.missing * _seconds(self.device, partial(self._one_more, hidden))
        return taken

    def _learn(self, batch: Batch) -> None:
        with autocast(self.device, self.dtype):
            out = self.model(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                image_features=batch.image_features,
                image_mask=batch.image_mask,
                labels=batch.labels,
            )
        out.loss.backward()

    def _one_more(self, hidden: Tensor) -> None:
        with autocast(self.device, self.dtype):
            out, _ = self.block(hidden, AttentionContext(self.model.model, hidden, None, None), None)
        out.sum().backward()

    def update(self) -> float:
        """Seconds of AdamW for all numbers that learn, which take the same time each."""
        probe = torch.zeros(min(self.learnt, PROBE), device=self.device, requires_grad=True)
        probe.grad = torch.zeros_like(probe)
        optimiser = torch.optim.AdamW([probe], lr=0.0, fused=has_fused_adamw(self.device))
        optimiser.step()  # makes its state
        return _seconds(self.device, optimiser.step) * self.learnt / len(probe)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started
