"""The learning rate over a run."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, peak: float) -> float:
    """lr/10 + ½·lr·(1 + cos(π·step/total)): the published cosine, from 1.1·lr at step 0 down to lr/10."""
    return peak / 10 + 0.5 * peak * (1 + math.cos(math.pi * step / total))
