"""How both models of the demo's assets are trained."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How many steps the assets of a generation take at most, and the highest learning rates."""

    tower_steps: int
    tower_lr: float
    base_steps: int
    base_lr: float


def descend(
    name: str, optimiser: torch.optim.Optimizer, losses: Iterator[Tensor], steps: int, rising: float
) -> Iterator[int]:
    """Do a step for each loss and yield its number. The rate rises over a share of the steps, and then falls."""
    (group,) = optimiser.param_groups
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=group["lr"], total_steps=steps, pct_start=rising)
    started = time.time()
    for step, loss in enumerate(losses, 1):
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            log.info(f"{name} {step}/{steps} loss {loss.item():.4f} {time.time() - started:.0f} s")
        yield step
