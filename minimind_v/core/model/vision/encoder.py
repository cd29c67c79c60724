"""The frozen vision encoder: a tower that normalises its images itself. All facts about it come from its folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minimind_v.core.config.schema import CLIP_MEAN, CLIP_STD, VisionSpec
from minimind_v.core.model.vision.spec import read_vision_spec

__all__ = ["CLIP_MEAN", "CLIP_STD", "VisionEncoder", "VisionSpec", "read_vision_spec"]


class VisionEncoder(nn.Module):
    """A tower, [M, 3, S, S] → [M, P, width], that is never trained."""

    def __init__(self, tower: nn.Module, spec: VisionSpec) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.spec = spec
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    @property
    def config(self) -> Any:
        """The settings of the tower, by the names of ClipConfig."""
        return self.tower.config

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in evaluation mode whatever the rest of the model does: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images [M, 3, S, S], uint8 or already normalised → features [M, P, width]."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = (pixel_values.float() / 255 - self.mean) / self.std  # [M, 3, S, S]
        return self.tower(pixel_values.to(next(self.tower.parameters()).dtype))
