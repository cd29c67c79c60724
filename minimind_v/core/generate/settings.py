"""The settings of sampling, checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from minimind_v.core.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Sampling of tokens: nucleus sampling (Holtzman et al., 2020), or the likeliest token at temperature 0."""

    temperature: float = 0.65
    top_p: float = 0.85
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"--temperature must be at least 0, not {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, not {self.top_p:g}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be at least 0 and below 2^63, not {self.seed}")


GREEDY = Sampling(temperature=0.0)
