"""How long a recipe would take on this machine: measured on a few made-up rows with random weights."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.batch import Batch
from minimind_v.core.device import autocast, pick_device
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vision import VisionEncoder, VisionSpec
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.freeze import freeze

SECONDS = 4.0  # that the measured batch may take


@dataclass(frozen=True)
class TypicalRow:
    """What a row of a batch has on average, padding included."""

    length: float
    pictures: float
    supervised: float


@dataclass(frozen=True)
class Estimate:
    """Seconds of a whole run, None where they could not be measured, and how that is known."""

    seconds: float | None
    how: str


def estimate(config: RunConfig, row: TypicalRow, rows: float, updates: int, placeholder_id: int) -> Estimate:
    """Foretell a run over `rows` rows (all epochs together) in `updates` updates.

    A batch of the recipe's sizes, or as many of its rows as can be done in some seconds, goes forward and backward
    through a model of the recipe's sizes, vision tower included. No weights are read.
    """
    try:
        device = pick_device(config.device)
        spec, encoder = _tower(config.vision_model)
        model = VLM(config.model, spec, placeholder_id, encoder).to(device).train()
        learns = freeze(model, config.freeze)
        optimiser = torch.optim.AdamW(learns, lr=0.0, fused=True)
        length = min(round(row.length), config.data.max_length)

        def step(count: int) -> float:
            return _seconds(device, lambda: _learn(config, model, _batch(model, row, length, count).to(device)))

        alone = step(1)  # the first time pays for what is only made once
        alone = min(alone, step(1)) if alone < SECONDS else alone
        count = max(1, min(config.data.batch_size, int(SECONDS / alone)))
        together = step(count) if count > 1 else alone
        update = _seconds(device, optimiser.step)
    except torch.OutOfMemoryError:
        return Estimate(None, "not measured: a batch of this recipe does not fit into the device's memory")
    except Exception as error:  # an estimate must not end what has been counted
        return Estimate(None, f"not measured: {' '.join(str(error).split())[:200] or type(error).__name__}")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1):
        where += ", which are busy with other work: left alone they may be many times as fast"
    return Estimate(
        together / count * rows + update * updates,
        f"an estimate: {together:.2f} s for {count} made-up row{'s' * (count > 1)} of {length} tokens and "
        f"{row.pictures:.2g} pictures each, forward and backward with random weights, and {update:.3f} s "
        f"for an update, measured just now on {where}; reading, saving and what else runs are not in it",
    )


def _tower(folder: Path) -> tuple[VisionSpec, VisionEncoder]:
    """A vision tower of the sizes that a folder's configuration tells, its weights random."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from minimind_v.core.model.vision import read_vision_spec

    spec = read_vision_spec(folder)
    return spec, VisionEncoder(CLIPVisionModel(CLIPVisionConfig.from_pretrained(folder)), spec)


def _batch(model: VLM, row: TypicalRow, length: int, rows: int) -> Batch:
    """Rows of random ids with the usual number of pictures and answers."""
    patches, size = model.spec.tokens_per_image, model.spec.image_size
    length = max(length, 2)
    input_ids = torch.randint(0, model.config.vocab_size, (rows, length))
    image_mask = torch.zeros(rows, length, dtype=torch.bool)
    pictures = 0
    for number in range(rows):  # 1.5 pictures a row: one and two in turn
        here = min(int((number + 1) * row.pictures) - int(number * row.pictures), length // patches)
        image_mask[number, : here * patches] = True
        pictures += here
    labels = torch.full((rows, length), IGNORE)
    answers = min(max(round(row.supervised), 1), length - 1)
    labels[:, length - answers :] = input_ids[:, length - answers :]
    pixels = torch.randint(0, 256, (pictures, 3, size, size), dtype=torch.uint8) if pictures else None
    return Batch(input_ids, torch.ones(rows, length, dtype=torch.bool), labels, image_mask, pixels)


def _learn(config: RunConfig, model: VLM, batch: Batch) -> None:
    with autocast(model.device, config.dtype):
        out = model(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values,
            image_mask=batch.image_mask,
            labels=batch.labels,
        )
    out.loss.backward()


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
