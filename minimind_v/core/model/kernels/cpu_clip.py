"""CLIP and SigLIP on a CPU: as fast as their matrix products, whose weights are packed once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.model.kernels.cpu_linear import Product, page_out, product, state_of
from minimind_v.core.model.kernels.untouched import exactly_linear, unhooked
from minimind_v.core.model.vision.clip import ClipLayer, ClipVision
from minimind_v.core.model.vision.siglip import SiglipVision

# By the name of an activation: a scale and a function in place, activation(x) = function(scale · x) / scale.
SCALED: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "quick_gelu": (1.702, partial(F.silu, inplace=True)),
    "gelu_pytorch_tanh": (1.0, partial(torch.ops.aten.gelu_, approximate="tanh")),
}


class CpuClipVision(ClipVision):
    """ClipVision by packed weights, in fp32 and with an activation of SCALED; otherwise as ClipVision computes.

    It computes one image at a time, so that intermediate tensors stay in the cache of the CPU.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [M, 3, S, S] → the last hidden state without the class token, [M, P, width]."""
        packed = None if torch.is_grad_enabled() else packed_layers(self, images)
        if packed is None:
            return super().forward(images)
        embeddings = (self.pre_layrnorm(self.embeddings(image))[0] for image in images.split(1))  # [1 + P, width] each
        return torch.stack([packed(x)[1:] for x in embeddings])


class CpuSiglipVision(SiglipVision):
    """SiglipVision in the same way."""

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [M, 3, S, S] → the normed last hidden state, [M, P, width]."""
        packed = None if torch.is_grad_enabled() else packed_layers(self, images)
        if packed is None:
            return super().forward(images)
        embeddings = (self.embeddings(image)[0] for image in images.split(1))  # [P, width] each
        return torch.stack([self.post_layernorm(packed(x)) for x in embeddings])


class PackedLayers:
    """The layers of a tower, for one image. Sums are in place.

    The input of the activation and the sum behind it are scaled, so that quick_gelu is silu.
    """

    def __init__(self, tower: ClipVision | SiglipVision) -> None:
        self.heads = tower.config.num_attention_heads
        self.scale, self.activation = SCALED[tower.config.hidden_act]
        self.tokens = len(tower.embeddings.position_embedding.weight)
        self.layers = [self._pack(layer) for layer in tower.encoder.layers]

    def _pack(self, layer: nn.Module) -> tuple[ClipLayer, list[Product]]:
        assert isinstance(layer, ClipLayer)
        scales = (1, 1, 1, 1, self.scale, self.scale)  # of biases
        pairs = zip(linears_of(layer), scales, strict=True)
        return layer, [product(linear.weight, linear.bias * scale, self.tokens) for linear, scale in pairs]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, width] → [T, width], in x."""
        for layer, (*projections, out_proj, fc1, fc2) in self.layers:
            normed = layer.layer_norm1(x)
            q, k, v = (proj(normed).view(1, len(x), self.heads, -1).transpose(1, 2) for proj in projections)
            attended = F.scaled_dot_product_attention(q, k, v)[0]  # [heads, T, hd]
            x.add_(out_proj(attended.transpose(0, 1).reshape(x.shape)))
            normed = layer.layer_norm2(x).mul_(self.scale)
            x.add_(fc2(self.activation(fc1(normed))), alpha=1 / self.scale)
        return x


def linears_of(layer: nn.Module) -> tuple[nn.Linear, ...]:
    """All Linears of a layer, in the order of their use."""
    assert isinstance(layer, ClipLayer)
    attention, mlp = layer.self_attn, layer.mlp
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2


_PACKED: WeakKeyDictionary[nn.Module, tuple[object, PackedLayers]] = WeakKeyDictionary()


def packed_layers(tower: ClipVision | SiglipVision, images: Tensor) -> PackedLayers | None:
    """The layers by packed weights, at their present values; None if the plain code must run."""
    weights = list(tower.encoder.parameters())
    exact = images.dtype == weights[0].dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not exact or images.device.type != "cpu" or tower.config.hidden_act not in SCALED:
        return None
    linears = [linear for layer in tower.encoder.layers for linear in linears_of(layer)]
    if not exactly_linear(*linears) or not unhooked(tower.encoder.modules()):
        return None
    state = state_of(weights)
    packed = _PACKED.get(tower)
    if packed is None or packed[0] != state:
        packed = _PACKED[tower] = state, PackedLayers(tower)
        for weight in weights:  # so that they are not in memory twice
            page_out(weight)
    return packed[1]
