"""A micro-batch as the device works through it."""

from __future__ import annotations

from dataclasses import replace

import torch

from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureCache

# Positions that a CPU works through together, or one row. Of 1,200 it takes some 2 % longer; 2,400 save another 1 %
# and take a sixth more of the run's memory.
CPU_POSITIONS = 1600


def parts_of(batch: Batch, memory: FeatureCache, device: torch.device) -> list[Batch]:
    """The batch on its device, its pictures looked at, in the parts whose gradients are added up."""
    moved = batch.to(device)
    seen = replace(moved, pixel_values=None, image_features=memory.features(moved), remembered=None)
    return seen.split(CPU_POSITIONS) if device.type == "cpu" else [seen]
