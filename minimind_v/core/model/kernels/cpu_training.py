"""Parts of a block whose backward passes are written out, because autograd's own move more memory than they compute.

On a CPU a block's matrix products run near the machine's peak, and a third of the time goes to reading and writing
tensors between them. Written out, most steps happen in place, what is cheap to compute again is not kept, and gradients
that add up do so inside a product. The functions are those of the plain formulas; the tests compare them.

Under autocast, products are computed in its type, as `F.linear` would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minimind_v.core.model import ops

BLOCK = 96  # queries that attend together; 64 and 128 take as long
WEIGHTS_KEPT = 768  # tokens of a row up to which its attention is kept: of 1,200 there is no gain any more


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in fp32 (Zhang & Sennrich, 2019)."""
    if torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.float32:
        return _RmsNorm.apply(x, weight, eps)
    if x.device.type == "mps":
        return ops.rms_norm(x, weight, eps)
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU: (silu(x gateᵀ) · x upᵀ) downᵀ (Shazeer, 2020). x [N, D], gate and up [I, D], down [D, I] → [N, D]."""
    if x.device.type == "mps":
        return ops.feed_forward(x, gate, up, down)
    return _FeedForward.apply(x, gate, up, down)


def project(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, turns: Tensor, shared: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, T, hd] of x [B, T, D] by weights [heads · hd, D], queries and keys turned.

    turns [B or 1, T, heads + kv heads, hd/2], complex, are the angles of the positions, and may scale as well. Of
    queries and keys the two halves of a head come interleaved, so that a pair to be turned is one complex number; their
    products do not change. `shared` as in `attend_together`. Of real turns, as `turn` says, no more than plain formulas
    are asked.
    """
    if not turns.is_complex():
        return ops.project(x, interleave(q, 2 * turns.shape[-2]), interleave(k, 2 * turns.shape[-2]), v, turns)
    return _Project.apply(x, q, k, v, turns, shared)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: q [B, heads, T, hd], scaled already, k and v [B, KV, S, hd] → [B, T, heads · hd].

    Queries are those of the last T of S positions.
    Learning from rows of ordinary length on a CPU, it keeps the weights of attention for the backward pass, which
    torch's own computes again: memory grows with T², time falls by a third.
    """
    plain = q.device.type != "cpu" or q.dtype != torch.float32 or q.shape[2] > WEIGHTS_KEPT
    if plain or not (torch.is_grad_enabled() and q.requires_grad):
        ahead = k.shape[2] - q.shape[2]
        mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril_(ahead) if ahead else None
        out = ops.attention(q, k, v, mask, causal=not ahead, scale=1.0)
        return out.transpose(1, 2).flatten(2)
    return _Attend.apply(q, k, v)


def attend_together(q: Tensor, k: Tensor, v: Tensor, shared: int, rows: int) -> Tensor:
    """`attend` of rows that all begin with the same `shared` positions: these stand once, in front of all rows' others.

    q [1, heads, N, hd], k and v [1, KV, N, hd] → [1, N, heads · hd], N = shared + rows · (T - shared).
    """
    front = [part[:, :, :shared] for part in (q, k, v)]
    apart = [part[0, :, shared:].unflatten(1, (rows, -1)).transpose(0, 1) for part in (q, k, v)]  # [B, heads, ·, hd]
    keys, values = (
        torch.cat([part.expand(rows, -1, -1, -1), own], dim=2)  # [B, KV, T, hd]
        for part, own in zip(front[1:], apart[1:], strict=True)
    )
    return torch.cat([attend(*front), attend(apart[0], keys, values).flatten(0, 1)[None]], dim=1)


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of [heads · hd, D] reordered: the halves of each head, which rotate with each other, in turn."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def separate(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave`."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """x [B, T, heads, hd] of any strides, halves interleaved, turned by [B or 1, T, heads or 1, hd/2]; in place.

    Where complex numbers are not to be relied on, as on MPS, turns are real, [..., hd/2, 2].
    """
    if not turns.is_complex():
        return x.copy_(ops.turned(x, turns))
    if x.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns)
        return x
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns
    return x.copy_(torch.view_as_real(turned).flatten(-2))


def computing(x: Tensor) -> torch.dtype:
    """The type that products of x are computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * x).mul_(inverse).flatten(0, -2).sum(dim=0)
        if ctx.needs_input_grad[0]:
            dx = dy * weight
            along = (dx * x).sum(dim=-1, keepdim=True)  # what of it would only change the length of x
            dx.addcmul_(x, along.mul_(inverse.square()).div_(x.shape[-1]), value=-1).mul_(inverse)
        return dx, dweight, None


class _FeedForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_w: Tensor, up_w: Tensor, down_w: Tensor) -> Tensor:
        x, gate_w, up_w, down_w = (tensor.to(computing(x)) for tensor in (x, gate_w, up_w, down_w))
        gate, up = x @ gate_w.t(), x @ up_w.t()  # [N, I]
        inner = F.silu(gate).mul_(up)
        read = x if any(ctx.needs_input_grad[1:3]) else None
        ctx.save_for_backward(read, gate, up, inner if ctx.needs_input_grad[3] else None, gate_w, up_w, down_w)
        return inner @ down_w.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, inner, gate_w, up_w, down_w = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        ddown = dy.t() @ inner if wanted[3] else None
        flow = dy @ down_w  # [N, I]
        dup = F.silu(gate).mul_(flow)
        dgate = torch.ops.aten.silu_backward.grad_input(flow.mul_(up), gate, grad_input=flow)
        dx = (dgate @ gate_w).addmm_(dup, up_w) if wanted[0] else None
        return dx, dgate.t() @ x if wanted[1] else None, dup.t() @ x if wanted[2] else None, ddown


class _Project(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q_w: Tensor, k_w: Tensor, v_w: Tensor, turns: Tensor, shared: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind, head_dim = computing(x), 2 * turns.shape[-1]
        weight = torch.cat((interleave(q_w, head_dim), interleave(k_w, head_dim), v_w)).to(kind)  # [W, D]
        x = x.to(kind)
        parts = (x @ weight.t()).unflatten(-1, (-1, head_dim))  # [B, T, all heads, hd]
        ctx.heads = [len(rows) // head_dim for rows in (q_w, k_w, v_w)]
        _turn_together(parts[:, :, : -ctx.heads[2]], turns, shared)
        ctx.shared = shared
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:4]) else None, weight, turns)
        q, k, v = (part.transpose(1, 2) for part in parts.split(ctx.heads, dim=2))
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, turns = ctx.saved_tensors
        head_dim = dq.shape[-1]
        flow = torch.cat([part.transpose(1, 2) for part in (dq, dk, dv)], dim=2)  # [B, T, all heads, hd]
        _turn_together(flow[:, :, : -ctx.heads[2]], turns.conj_physical(), ctx.shared)
        flow = flow.flatten(-2)  # [B, T, W]
        dx = flow @ weight if ctx.needs_input_grad[0] else None
        if x is None:
            return dx, None, None, None, None, None
        dq_w, dk_w, dv_w = (flow.flatten(0, 1).t() @ x.flatten(0, 1)).split([n * head_dim for n in ctx.heads])
        return dx, separate(dq_w, head_dim), separate(dk_w, head_dim), dv_w, None, None


def _turn_together(x: Tensor, turns: Tensor, shared: int) -> None:
    """`turn`, where `shared` positions stand once, in front of all rows' others: x [1, N, heads, hd]."""
    if shared:
        turn(x[:, :shared], turns[:, :shared])
        x, turns = x[0, shared:].unflatten(0, (-1, turns.shape[1] - shared)), turns[:, shared:]
    turn(x, turns)


class _Attend(Function):
    """Queries in blocks; each meets the keys up to its end. Those of one group are rows (t, head) of one matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, heads, time, width), (_, groups, long, _) = q.shape, k.shape
        each = heads // groups
        q = q.unflatten(1, (groups, each)).transpose(2, 3).reshape(batch * groups, time * each, width)
        k, v = (part.reshape(batch * groups, long, width) for part in (k, v))
        out, kept = torch.empty_like(q), []
        ahead = q.new_full((BLOCK, BLOCK), -math.inf).triu_(1)[:, None]  # [n, 1, n], of keys that are not to be seen
        for rows, begin, end in _blocks(time, long, each):
            weights = torch.bmm(q[:, rows], k[:, :end].mT)  # [B·KV, n·each, end]
            weights.view(len(q), -1, each, end)[..., begin:].add_(ahead[: end - begin, :, : end - begin])
            torch.ops.aten._softmax.out(weights, -1, False, out=weights)
            out[:, rows] = torch.bmm(weights, v[:, :end])
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(batch, groups, time, each, width).transpose(1, 2).reshape(batch, time, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *kept = ctx.saved_tensors
        (batch, time, _), width = dout.shape, q.shape[-1]
        each = q.shape[1] // time
        dout = dout.view(batch, time, -1, each, width).transpose(1, 2).reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for weights, (rows, _, end) in zip(kept, _blocks(time, k.shape[1], each), strict=True):
            dv[:, :end].baddbmm_(weights.mT, dout[:, rows])
            flow = torch.bmm(dout[:, rows], v[:, :end].mT)
            torch.ops.aten._softmax_backward_data.out(flow, weights, -1, flow.dtype, grad_input=flow)
            dq[:, rows] = torch.bmm(flow, k[:, :end])
            dk[:, :end].baddbmm_(flow.mT, q[:, rows])
        dq = dq.view(batch, -1, time, each, width).transpose(2, 3).flatten(1, 2)
        return dq, *(part.unflatten(0, (batch, -1)) for part in (dk, dv))


def _blocks(time: int, long: int, each: int) -> Iterator[tuple[slice, int, int]]:
    """The rows of each block of queries, and from and to which position it is, the last being number `long`."""
    for begin in range(0, time, BLOCK):
        end = min(begin + BLOCK, time)
        yield slice(begin * each, end * each), long - time + begin, long - time + end
