"""The settings of sampling, checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from minimind_v.core.arguments import check_arguments
from minimind_v.core.errors import UsageError
from minimind_v.core.rows.row import IMAGE_MARK


@dataclass(frozen=True)
class Sampling:
    """Sampling of tokens: from the likeliest by several limits, or the likeliest one at temperature 0."""

    temperature: float = 0.65
    top_p: float = 0.85  # nucleus sampling (Holtzman et al., 2020): the fewest that hold this share
    seed: int | None = None
    top_k: int = 0  # so many; 0: all
    min_p: float = 0.0  # those with at least this share of the likeliest's probability (Nguyen et al., 2024)
    repetition_penalty: float = 1.0  # divides the odds of tokens that the text has already (Keskar et al., 2019)

    def __post_init__(self) -> None:
        check_arguments(Sampling, vars(self))
        if not self.temperature >= 0:
            raise UsageError(f"temperature must be at least 0, not {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p:g}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be at least 0 and below 2^63, not {self.seed}")
        if self.top_k < 0:
            raise UsageError(f"top_k must be at least 0, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p must be at least 0 and at most 1, not {self.min_p:g}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(f"repetition_penalty must be above 0, not {self.repetition_penalty:g}")


def check_most(max_new_tokens: int) -> None:
    """Raises UsageError for an answer of no tokens."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}")


def check_system(system: str | None) -> None:
    """Raises UsageError for a system prompt with an image mark."""
    if system is not None and IMAGE_MARK in system:
        raise UsageError(f"{IMAGE_MARK} in the system prompt: only a question has images")


GREEDY = Sampling(temperature=0.0)
