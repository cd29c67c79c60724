"""The plain formulas, for Apple's GPU (MPS), for which the faster ones were neither written nor measured.

Nobody has run them there yet: they keep to products, sums and softmax, on which every model depends. What they avoid is
reported to fail in releases of torch that `mmv` runs with: attention in one call (is_causal in bf16 lets tokens see
later ones, queries that are not contiguous give wrong numbers, grouped heads end the process), and complex numbers
before macOS 14. The tests compare them with the others on the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(q kᵀ · scale) v for queries [B, heads, T, hd] of keys and values [B, KV, S, hd] → [B, heads, T, hd].

    mask [B or 1, 1, T or 1, S] or [T, S] is true where a query may attend; `scale` is 1/√hd where none is given. The
    plain formula on MPS, elsewhere the kernel that torch chooses.
    """
    if q.device.type == "mps":
        return plain_attention(q, k, v, mask, causal, scale)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """`attention` by the formula."""
    groups, time, width = k.shape[1], q.shape[2], q.shape[3]
    rows = q.unflatten(1, (groups, -1)).flatten(2, 3)  # [B, KV, heads/KV · T, hd]
    scores = (rows @ k.mT).float() * (width**-0.5 if scale is None else scale)
    scores = scores.unflatten(2, (-1, time))  # [B, KV, heads/KV, T, S]
    if causal:
        mask = torch.arange(time, device=q.device)[:, None] >= torch.arange(k.shape[2], device=q.device)  # [T, S]
    if mask is not None:
        mask = mask[:, :, None] if mask.ndim == 4 else mask
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).to(v.dtype).flatten(2, 3)  # [B, KV, heads/KV · T, S]
    return (weights @ v).unflatten(2, (-1, time)).flatten(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in fp32."""
    exact = x.float()
    return (exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU: (silu(x gateᵀ) · x upᵀ) downᵀ. x [N, D], gate and up [I, D], down [D, I] → [N, D]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def project(x: Tensor, q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, T, hd] of x [B, T, D]; turns [B or 1, T, heads + kv heads, hd/2, 2].

    The weights [heads · hd, D] of queries and keys have the halves of each head interleaved.
    """
    queries, keys, values = (F.linear(x, weight).unflatten(-1, (-1, 2 * turns.shape[-2])) for weight in (q, k, v))
    heads = queries.shape[2]
    queries, keys = turned(queries, turns[:, :, :heads]), turned(keys, turns[:, :, heads:])
    return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """x [B, T, heads, hd], whose neighbours are pairs, turned by cosines and sines [B or 1, T, heads or 1, hd/2, 2]."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.unbind(-1)
    pairs = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return pairs.flatten(-2).to(x.dtype)
