"""The learning-rate schedule."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, lr: float) -> float:
    """lr/10 + ½·lr·(1 + cos(π·step/total)): the published cosine. `lr` is not its peak: see `peak`."""
    return lr / 10 + 0.5 * lr * (1 + math.cos(math.pi * step / total))


def peak(lr: float) -> float:
    """The highest rate of a run, that of its first step: 1.1·lr."""
    return learning_rate(0, 1, lr)


def reach(lr: float, total: int) -> float:
    """The largest change of a weight in a run: AdamW changes it by about the rate in each step."""
    return 0.6 * lr * total  # the cosine's mean is 0.6·lr
