"""Sample the next token from the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from minimind_v.core.generate.settings import GREEDY, Sampling

__all__ = ["GREEDY", "Sampler", "Sampling"]

FEW = 64  # of the likeliest, in which a draw mostly ends


class Sampler:
    """Draws token ids with random numbers of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()
        if sampling.seed is not None:
            self.generator.manual_seed(sampling.seed)
        else:
            self.generator.seed()

    def __call__(self, logits: Tensor) -> int:
        """One id from logits [V]. Draws from what a full sort would, without sorting the unlikely."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        behind = (logits - logits.max()).cpu().double()  # so that the smallest temperature cannot overflow
        probs = (behind / self.sampling.temperature).softmax(dim=-1)  # [V]
        if self.sampling.top_p == 1:
            return _draw(probs.cumsum(dim=-1), self.generator)
        ordered, ids = probs.topk(min(FEW, len(probs)))  # most mass is on few
        mass = ordered.cumsum(dim=-1)
        if mass[-1] < self.sampling.top_p:  # numpy sorts in a quarter of the time that torch takes
            values = probs.numpy()
            ids = torch.from_numpy((-values).argsort())
            ordered = torch.from_numpy(values[ids])
            mass = ordered.cumsum(dim=-1)
        end = int((mass - ordered < self.sampling.top_p).sum())  # of the fewest that hold p: those before hold less
        return int(ids[_draw(mass[:end], self.generator)])


def _draw(mass: Tensor, generator: torch.Generator) -> int:
    """An index as likely as its step in the ascending sums `mass`."""
    point = torch.rand(1, dtype=mass.dtype, generator=generator) * mass[-1]
    return int(torch.searchsorted(mass, point, right=True).clamp(max=len(mass) - 1))
