"""Attention and norms by their formulas, for Apple's GPU (MPS), where no kernel was measured.

They have not run there yet: they keep to products, sums and softmax, on which every model depends. Attention in one
call is reported to fail in releases of torch that `mmv` runs with: is_causal in bf16 lets tokens attend to later ones,
queries that are not contiguous give wrong numbers, grouped heads end the process. The tests compare it on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimind_v.core.model.decoder import Attention, RMSNorm
from minimind_v.core.model.vision.clip import ClipAttention


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """`ops.attention` by its formula."""
    groups, time, width = k.shape[1], q.shape[2], q.shape[3]
    rows = q.unflatten(1, (groups, -1)).flatten(2, 3)  # [B, KV, heads/KV · T, hd]
    scores = ((rows @ k.mT).float() * width**-0.5).unflatten(2, (-1, time))  # [B, KV, heads/KV, T, S]
    if is_causal:
        mask = torch.arange(time, device=q.device)[:, None] >= torch.arange(k.shape[2], device=q.device)  # [T, S]
    elif mask is not None:
        mask = mask[:, :, None]  # [B or 1, 1, 1, T or 1, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).to(v.dtype).flatten(2, 3)  # [B, KV, heads/KV · T, S]
    return (weights @ v).unflatten(2, (-1, time)).flatten(1, 2)  # [B, heads, T, hd]


class AppleRMSNorm(RMSNorm):
    """RMSNorm by the formula."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D]."""
        exact = x.float()
        scale = torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + self.eps)  # [..., 1]
        return (exact * scale * self.weight.float()).to(x.dtype)


class AppleAttention(Attention):
    """Attention by the formula."""

    attend = staticmethod(attention)


class AppleClipAttention(ClipAttention):
    """CLIP's attention by the formula."""

    attend = staticmethod(attention)
