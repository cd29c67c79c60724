"""Several GPUs: their steps are recorded too, exchanged outside of the graphs, and read one step late.

Processes that meet over gloo stand in for GPUs, and a tape of torch's operators for a CUDA graph.
"""

from __future__ import annotations

import math
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minimind_v.core.errors import LostContact
from minimind_v.core.train import distributed
from minimind_v.core.train.distributed import ALONE
from minimind_v.core.train.graph import EAGER
from tests.conftest import Events, GivenBatches
from tests.train.late import (
    MODELS, group_experts, make_batch, make_run, make_step, no_waits, record_steps, same, tensors_of,
)  # fmt: skip
from tests.train.together import FOLDER, meeting, together

CLOSE = {"atol": 5e-6, "rtol": 1e-5}


def shares(step: int) -> list:
    """The micro-batches of a step; process r of n has every n-th from r. Some have no image, some steps only one."""
    torch.manual_seed(step)
    batches = [make_batch([32 - step % 5, 20 + step % 7], [2, 1], [3 + step % 5, 1 + step % 3]),
               make_batch([30, 18 + step % 3], [0, 0], [2, 1 + step % 4])]  # fmt: skip
    return {0: batches[::-1], 1: batches[:1], 2: batches[1:]}.get(step % 5, batches)


def train(train_step, world, steps) -> list:
    """The results of steps; the counts are those of all processes."""
    results = []
    for step in steps:
        batches = shares(step)
        supervised, rows = sum(batch.supervised for batch in batches), sum(map(len, batches))
        images = sum(batch.images for batch in batches)
        results.append(train_step(batches[world.rank :: world.size], supervised, rows, 1e-3, images).result)
    return results
