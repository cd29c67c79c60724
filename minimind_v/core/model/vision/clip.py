"""CLIP's vision encoder (Radford et al., 2021) of any size, with transformers' parameter names.

transformers' CLIPVisionModel computes the same. It is not used because importing it takes longer than all else that is
done before a question is answered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.model import ops
from minimind_v.core.model.vision.clip_config import ClipConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's own
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class ClipVision(nn.Module):
    """Images in, features of their patches out."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(width, eps=eps)  # spelled so in the published files
        self.encoder = ClipLayers(config)
        self.post_layernorm = nn.LayerNorm(width, eps=eps)  # in the files; features are taken before it

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [M, 3, S, S] → the last hidden state without the class token, [M, P, width]."""
        return self.encode(self.embeddings(images))[:, 1:]

    def encode(self, x: Tensor) -> Tensor:
        """Embeddings [M, T, width] → the last hidden state [M, T, width]."""
        x = self.pre_layrnorm(x)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class Embeddings(nn.Module):
    """The class token and the patches of images, with their positions."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width)))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, patch, bias=False)
        self.position_embedding = nn.Embedding(1 + (config.image_size // patch) ** 2, width)

    def forward(self, images: Tensor) -> Tensor:
        """[M, 3, S, S] → [M, 1 + P, width]."""
        patches = self.patch_embedding(images).flatten(2).mT  # [M, P, width]
        class_token = self.class_embedding.expand(len(images), 1, -1)  # [M, 1, width]
        return torch.cat((class_token, patches), dim=1) + self.position_embedding.weight


class ClipLayers(nn.Module):
    """The layers, under the name that the published files give them."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.num_hidden_layers))


class ClipLayer(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.self_attn = ClipAttention(config)
        self.mlp = ClipFeedForward(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """[M, T, width] → [M, T, width]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipAttention(nn.Module):
    """Self-attention of every position to all."""

    attend = staticmethod(ops.attention)

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[M, T, width] → [M, T, width]."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [M, T, width] each
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [M, heads, T, hd]
        out = self.attend(q, k, v)  # [M, heads, T, hd]
        return self.out_proj(out.transpose(1, 2).flatten(2))


class ClipFeedForward(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[M, T, width] → [M, T, width]."""
        return self.fc2(self.activation(self.fc1(x)))
