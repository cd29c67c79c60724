"""The learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cosine:
    """A cosine from `peak` down to lr/10: lr/10 + amplitude·lr·(1 + cos(π·t/total)). The published code has two."""

    amplitude: float  # half of what the rate falls by, as a share of lr
    first: int  # t of the first step

    def rate(self, step: int, total: int, lr: float) -> float:
        """The rate of a step, counted from 1, of `total`."""
        t = step - 1 + self.first
        return lr / 10 + self.amplitude * lr * (1 + math.cos(math.pi * t / total))

    def peak(self, lr: float) -> float:
        """The highest rate of a run, that of its beginning. It may be above `lr`."""
        return lr / 10 + 2 * self.amplitude * lr

    def reach(self, lr: float, total: int) -> float:
        """The largest change of a weight in a run: AdamW changes it by about the rate in each step."""
        return (0.1 + self.amplitude) * lr * total  # the cosine's mean


COSINE_2025 = Cosine(amplitude=0.5, first=0)  # from 1.1·lr
COSINE_2026 = Cosine(amplitude=0.45, first=1)  # from lr
