"""The formulas of the language model, as papers print them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension, computed in fp32 (Zhang & Sennrich, 2019)."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-rotation form (Su et al., 2021; Llama, NeoX).

    Component i of a head and component i + hd/2 are a point of a plane, turned by the angle of its position.
    x [B, heads, T, hd]; cos, sin [B or 1, 1, T, hd] → [B, heads, T, hd].
    """
    x1, x2 = x.chunk(2, dim=-1)  # [B, heads, T, hd/2] each
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √hd) v, several query heads to one key-value head (Ainslie et al., 2023).

    q [B, heads, T, hd]; k, v [B, KV, S, hd] → [B, heads, T, hd]. mask [B or 1, 1, T or 1, S] is true where a query may
    attend; is_causal, for T = S: query t attends to keys 0 … t.
    """
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, element by element (Shazeer, 2020)."""
    return F.silu(gate) * up


def select(x: Tensor, positions: Tensor | None) -> Tensor:
    """x [B, T, ...] at positions [S], counted through the batch (b · T + t) → [S, ...]; None: x as it is."""
    return x if positions is None else x.flatten(0, 1).index_select(0, positions)
