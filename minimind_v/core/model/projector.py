"""The bridge from what CLIP sees to what the language model reads: one linear layer."""

from __future__ import annotations

from torch import Tensor, nn


class VisionProjector(nn.Module):
    """Linear(vision width → hidden size) with bias; its keys are `vision_proj.vision_proj.0.{weight,bias}`."""

    def __init__(self, vision_width: int, hidden_size: int) -> None:
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(vision_width, hidden_size))  # the published names want the wrapping

    def forward(self, image_features: Tensor) -> Tensor:
        """[M, P, vision width] → [M, P, hidden size]."""
        return self.vision_proj(image_features)
