"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind_v.core.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: nucleus sampling (Holtzman et al., 2020), or the likeliest where temperature is 0."""

    temperature: float = 0.65
    top_p: float = 0.85
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"--temperature must be 0 or more, not {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must lie above 0 and not above 1, not {self.top_p:g}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be 0 or more and below 2^63, not {self.seed}")


GREEDY = Sampling(temperature=0.0)


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
        """One id from logits [V]."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        behind = (logits - logits.max()).double().cpu()  # so that the smallest temperature cannot overflow
        probs = (behind / self.sampling.temperature).softmax(dim=-1)  # [V]
        ordered, ids = probs.sort(descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the mass of all likelier tokens
        ordered[before >= self.sampling.top_p] = 0  # the likeliest always stays
        return int(ids[torch.multinomial(ordered, 1, generator=self.generator)])
