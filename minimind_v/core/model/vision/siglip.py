"""SigLIP's vision encoder (Zhai et al., 2023; Tschannen et al., 2025), with transformers' parameter names.

transformers' SiglipVisionModel computes the same. Its layers are those of CLIP. There is no class token, and features
are taken behind the last norm; the pooling head that files may have is not used.
"""

from __future__ import annotations

from torch import Tensor, nn

from minimind_v.core.model.vision.clip import ClipLayers
from minimind_v.core.model.vision.siglip_config import SiglipConfig


class SiglipVision(nn.Module):
    """Images in, features of their patches out."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Patches(config)
        self.encoder = ClipLayers(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [M, 3, S, S] → the normed last hidden state, [M, P, width]."""
        x = self.embeddings(images)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class Patches(nn.Module):
    """The patches of images, with their positions."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, patch)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2, width)

    def forward(self, images: Tensor) -> Tensor:
        """[M, 3, S, S] → [M, P, width]."""
        patches = self.patch_embedding(images).flatten(2).mT  # [M, P, width]
        return patches + self.position_embedding.weight
