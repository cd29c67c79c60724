"""CLIP's vision tower (Radford et al., 2021) of any size, with the names that transformers gives its parts.

transformers' CLIPVisionModel has the same parts and may stand in its place. It is not used for itself because importing
it takes longer than all else that is done before a question is answered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.model import ops
from minimind_v.core.model.vision.spec import ClipConfig

QUICK = 1.702  # of CLIP's own activation
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(QUICK * x),
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class ClipVision(nn.Module):
    """The parts of a tower, and random numbers in them."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_layer(config) for _ in range(config.num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # features are before it


class Embeddings(nn.Module):
    """Pictures [M, 3, S, S] → what is read of them [M, 1 + P, width]: the class token and patches, with positions."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width)))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, patch, bias=False)
        self.position_embedding = nn.Embedding(1 + (config.image_size // patch) ** 2, width)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.patch_embedding(pictures).flatten(2).mT  # [M, P, width]
        first = self.class_embedding.expand(len(pictures), 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


def _layer(config: ClipConfig) -> nn.Module:
    width, inner = config.hidden_size, config.intermediate_size
    return nn.ModuleDict({
        "self_attn": nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")}),
        "mlp": nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)}),
        "layer_norm1": nn.LayerNorm(width, eps=config.layer_norm_eps),
        "layer_norm2": nn.LayerNorm(width, eps=config.layer_norm_eps),
    })  # fmt: skip


def encode(tower: Any, x: Tensor) -> Tensor:
    """The last hidden state of what a tower's `embeddings` gave: [M, T, width] → [M, T, width]."""
    heads, activate = tower.config.num_attention_heads, ACTIVATIONS[tower.config.hidden_act]
    x = tower.pre_layrnorm(x)
    for layer in tower.encoder.layers:
        attention, normed = layer.self_attn, layer.layer_norm1(x)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (proj(normed).unflatten(-1, (heads, -1)).transpose(1, 2) for proj in projections)
        seen = ops.attention(q, k, v)  # [M, heads, T, hd]
        x = x + attention.out_proj(seen.transpose(1, 2).flatten(2))
        x = x + layer.mlp.fc2(activate(layer.mlp.fc1(layer.layer_norm2(x))))
    return x
