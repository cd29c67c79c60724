"""A projector in one file: four neighbouring features become one token (pixel shuffle), through an MLP.

MMV_EXTENSIONS=extend_projector.py mmv train pretrain --set projector=shuffle …
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from minimind_v.core.config.schema import VisionSpec
from minimind_v.core.errors import UsageError
from minimind_v.core.model.projector import PROJECTORS, Projector


class PixelShuffle(Projector):
    """Features [M, P, W] of a square of patches → embeddings [M, P/4, D]."""

    def __init__(self, spec: VisionSpec, hidden_size: int) -> None:
        super().__init__(spec, hidden_size)
        self.side = math.isqrt(spec.tokens_per_image)  # patches
        self.shuffle = nn.Sequential(
            nn.LayerNorm(4 * spec.width),
            nn.Linear(4 * spec.width, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, features: Tensor) -> Tensor:
        rows = self.side // 2
        squares = features.unflatten(1, (rows, 2, rows, 2))  # [M, rows, 2, rows, 2, W]
        squares = squares.transpose(2, 3).flatten(3)  # [M, rows, rows, 4·W]
        return self.shuffle(squares.flatten(1, 2))  # [M, P/4, D]

    @staticmethod
    def tokens_per_image(spec: VisionSpec) -> int:
        side = math.isqrt(spec.tokens_per_image)
        if side**2 != spec.tokens_per_image or side % 2:
            raise UsageError(
                f"projector 'shuffle' needs an even number of patches in rows and columns, and this vision tower "
                f"yields {spec.tokens_per_image} features — use another --vision-model"
            )
        return spec.tokens_per_image // 4

    @staticmethod
    def vision_width(tensors: Mapping[str, Tensor]) -> int | None:
        weight = tensors.get("vision_proj.shuffle.1.weight")  # [D, 4·W]
        return None if weight is None or weight.ndim != 2 else weight.shape[1] // 4


PROJECTORS["shuffle"] = PixelShuffle
