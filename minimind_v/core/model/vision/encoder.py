"""The vision encoder: a frozen vision tower. All facts about it come from its folder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.config.schema import CLIP_MEAN, CLIP_STD, CLIP_VISION, VisionSpec
from minimind_v.core.model.kernels.cpu_linear import Product, page_out, product, state_of
from minimind_v.core.model.vision.clip import QUICK, encode
from minimind_v.core.model.vision.spec import read_vision_spec

__all__ = ["CLIP_MEAN", "CLIP_STD", "VisionEncoder", "VisionSpec", "read_vision_spec"]


class VisionEncoder(nn.Module):
    """A vision tower that is never trained, and normalises uint8 images by itself."""

    def __init__(self, tower: nn.Module, spec: VisionSpec) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.spec = spec
        self.mean: Tensor
        self.std: Tensor
        self._walk: tuple[object, Walk] | None = None  # and the state of the weights that it is made of
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    @property
    def config(self) -> Any:
        """What decides what the tower computes, by the names of ClipConfig."""
        return self.tower.config

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in evaluation mode whatever the rest of the model does: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images [M, 3, H, W], uint8 or already normalised → features [M, P, width].

        CLIP's features are the last hidden state before the post-layernorm, without the CLS token.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = (pixel_values.float() / 255 - self.mean) / self.std  # [M, 3, H, W]
        pixel_values = pixel_values.to(next(self.tower.parameters()).dtype)
        if self.spec.model_type != CLIP_VISION:
            features: Tensor = self.tower(pixel_values)  # [M, P, width]
            return features
        return self._look(pixel_values)[:, 1:]  # [M, P, width]

    def _look(self, pictures: Tensor) -> Tensor:
        exact = pictures.dtype == torch.float32 and not torch.is_autocast_enabled(pictures.device.type)
        walk = self._packed() if exact else None
        if walk is None:
            tower: Any = self.tower
            return encode(tower, tower.embeddings(pictures))
        return torch.stack([walk(one) for one in pictures.split(1)])

    def _packed(self) -> Walk | None:
        """The weights packed for a CPU, as they are now; None elsewhere."""
        tower: Any = self.tower
        weights = list(tower.parameters())
        if weights[0].device.type != "cpu" or tower.config.hidden_act != "quick_gelu":
            return None
        state = state_of(weights)
        if self._walk is None or self._walk[0] != state:
            self._walk = state, Walk(tower, 1 + self.spec.tokens_per_image)
        return self._walk[1]

    def release_memory(self) -> None:
        """Before a long run: where the weights are packed, the system need not keep them in memory twice."""
        if self.spec.model_type == CLIP_VISION and self._packed():
            for weight in self.tower.parameters():
                page_out(weight)


class Walk:
    """What CLIPVisionModel does to a picture, on a CPU: as fast as its products, which are packed.

    Pictures go alone, so that what lies between two products stays in the cache. The activation, x · sigmoid(1.702 x),
    is silu(1.702 x) / 1.702: the norm before and the sum behind it scale. What is added is added in place.
    """

    def __init__(self, tower: Any, tokens: int) -> None:
        self.tower = tower
        self.heads = tower.config.num_attention_heads
        self.layers = [self._pack(layer, tokens) for layer in tower.encoder.layers]

    @staticmethod
    def _pack(layer: Any, tokens: int) -> tuple[list[Product], Product, Product, Product]:
        def pack(linear: nn.Linear, scale: float = 1.0) -> Product:
            return product(linear.weight, linear.bias * scale, tokens)

        attention, mlp = layer.self_attn, layer.mlp
        projections = [pack(proj) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)]
        return projections, pack(attention.out_proj), pack(mlp.fc1, QUICK), pack(mlp.fc2, QUICK)

    def __call__(self, picture: Tensor) -> Tensor:
        """[1, 3, H, W] → [1 + P, width]."""
        x = self.tower.pre_layrnorm(self.tower.embeddings(picture))[0]  # [T, width]
        for layer, (projections, out, fc1, fc2) in zip(self.tower.encoder.layers, self.layers, strict=True):
            normed = layer.layer_norm1(x)
            q, k, v = (proj(normed).view(1, len(x), self.heads, -1).transpose(1, 2) for proj in projections)
            seen = F.scaled_dot_product_attention(q, k, v)[0]  # [heads, T, hd]
            x.add_(out(seen.transpose(0, 1).reshape(x.shape)))
            normed = layer.layer_norm2(x).mul_(QUICK)
            x.add_(fc2(F.silu(fc1(normed), inplace=True)), alpha=1 / QUICK)
        return x
