"""Hand-written backward passes of a decoder block for the CPU; autograd's own move more memory than they compute.

On a CPU a block's matrix products run near the machine's peak, and a third of the time goes to reading and writing
tensors between them. Written out, most steps happen in place, what is cheap to compute again is not kept, and gradients
that add up do so inside a product. The functions are those of the plain modules; the tests compare them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minimind_v.core.model.decoder import Attention, AttentionContext, RMSNorm
from minimind_v.core.model.feed_forward import FeedForward
from minimind_v.core.model.kernels.untouched import exactly_linear, unhooked

BLOCK = 96  # queries that attend together; 64 and 128 take as long
WEIGHTS_KEPT = 768  # tokens of a row up to which its attention is kept: at 1,200 there is no gain


def in_training(x: Tensor, *linears: nn.Module) -> bool:
    """Whether the functions below may compute these Linears of x: with gradients, in fp32, on a CPU."""
    exact = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return exact and torch.is_grad_enabled() and exactly_linear(*linears)


class CpuRMSNorm(RMSNorm):
    """RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D]."""
        return _RmsNorm.apply(x, self.weight, self.eps) if in_training(x) else super().forward(x)


class CpuFeedForward(FeedForward):
    """FeedForward."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D]."""
        linears = self.gate_proj, self.up_proj, self.down_proj
        if not in_training(x, *linears):
            return super().forward(x)
        return _FeedForward.apply(x.flatten(0, -2), *(linear.weight for linear in linears)).view_as(x)


class CpuAttention(Attention):
    """Attention that keeps its weights for the backward pass, which torch's own computes again.

    Memory grows with T², time falls by a third: for rows of ordinary length.
    """

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """x [B, T, D] → [B, T, D]."""
        linears, norms = (self.q_proj, self.k_proj, self.v_proj), (self.q_norm, self.k_norm)
        if context.cache is not None or not in_training(x, *linears) or not _exactly_norms(*norms):
            return super().forward(x, context)
        scales: tuple[Any, Any] = (None, None)  # of the norms of heads
        eps = 0.0
        if isinstance(self.q_norm, RMSNorm):
            scales, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
        weights = (linear.weight for linear in linears)
        q, k, v = _Project.apply(x, *weights, *scales, context.cos, context.sin, eps)
        if x.shape[1] > WEIGHTS_KEPT or not q.requires_grad:
            out = self.attend(q, k, v, None, True).transpose(1, 2).flatten(2)
        else:
            out = _Attend.apply(q, k, v)  # [B, T, D]
        return self.o_proj(out)


def _exactly_norms(*norms: nn.Module) -> bool:
    """Whether `_Project` may compute these norms of heads, or their absence."""
    return all(type(norm) in (RMSNorm, CpuRMSNorm, nn.Identity) for norm in norms) and unhooked(norms)


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
            along = (dx * x).sum(dim=-1, keepdim=True)  # the component along x
            dx.addcmul_(x, along.mul_(inverse.square()).div_(x.shape[-1]), value=-1).mul_(inverse)
        return dx, dweight, None


class _FeedForward(Function):
    """SwiGLU: x [N, D], gate and up [I, D], down [D, I] → [N, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_w: Tensor, up_w: Tensor, down_w: Tensor) -> Tensor:
        gate, up = x @ gate_w.t(), x @ up_w.t()  # [N, I]
        inner = F.silu(gate).mul_(up)
        kept_x = x if any(ctx.needs_input_grad[1:3]) else None
        ctx.save_for_backward(kept_x, gate, up, inner if ctx.needs_input_grad[3] else None, gate_w, up_w, down_w)
        return inner @ down_w.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, inner, gate_w, up_w, down_w = ctx.saved_tensors
        needs_x, needs_gate, needs_up, needs_down = ctx.needs_input_grad
        ddown = dy.t() @ inner if needs_down else None
        flow = dy @ down_w  # [N, I]
        dup = F.silu(gate).mul_(flow)
        dgate = torch.ops.aten.silu_backward.grad_input(flow.mul_(up), gate, grad_input=flow)
        dx = (dgate @ gate_w).addmm_(dup, up_w) if needs_x else None
        return dx, dgate.t() @ x if needs_gate else None, dup.t() @ x if needs_up else None, ddown


class _Project(Function):
    """Queries, keys and values [B, heads, T, hd] of x [B, T, D] by weights [heads · hd, D].

    Queries and keys are rotated; before, they are normed with weights [hd] where these are given.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q_w: Tensor, k_w: Tensor, v_w: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
        cos: Tensor, sin: Tensor, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        weight, head_dim = torch.cat((q_w, k_w, v_w)), cos.shape[-1]  # [W, D]
        ctx.heads = [len(rows) // head_dim for rows in (q_w, k_w, v_w)]
        heads = (x @ weight.t()).unflatten(-1, (-1, head_dim))  # [B, T, all heads, hd]
        qk, v = heads.tensor_split((-ctx.heads[2],), dim=2)
        normed = inverse = scale = None
        if q_norm is not None and k_norm is not None:
            scale = torch.cat((q_norm.expand(ctx.heads[0], -1), k_norm.expand(ctx.heads[1], -1)))  # [heads + KV, hd]
            norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True)
            inverse = norm.square_().div_(head_dim).add_(eps).rsqrt_()  # [B, T, heads + KV, 1]
            normed = qk.mul_(inverse)
            qk = normed * scale
        _rotate_(qk, cos, sin)
        kept_x = x if any(ctx.needs_input_grad[1:4]) else None
        ctx.save_for_backward(kept_x, weight, normed, inverse, scale, cos, sin)
        q, k = qk.split(ctx.heads[:2], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, normed, inverse, scale, cos, sin = ctx.saved_tensors
        flow = torch.cat([grad.transpose(1, 2) for grad in (dq, dk, dv)], dim=2)  # [B, T, all heads, hd]
        dqk = flow[:, :, : -ctx.heads[2]]
        _rotate_(dqk, cos, -sin)
        dnorms: Sequence[Tensor | None] = (None, None)
        if normed is not None:
            along = dqk * normed
            if any(ctx.needs_input_grad[4:6]):
                dnorms = [heads.sum(dim=(0, 1, 2)) for heads in along.split(ctx.heads[:2], dim=2)]  # [hd] each
            along = along.mul_(scale).mean(dim=-1, keepdim=True)  # the component along the head
            dqk.mul_(scale).addcmul_(normed, along, value=-1).mul_(inverse)
        flow = flow.flatten(-2)  # [B, T, W]
        dx = flow @ weight if ctx.needs_input_grad[0] else None
        if x is None:
            return dx, None, None, None, *dnorms, None, None, None
        dweight = flow.flatten(0, 1).t() @ x.flatten(0, 1)  # [W, D]
        return dx, *dweight.split([n * dq.shape[-1] for n in ctx.heads]), *dnorms, None, None, None


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`ops.rotate` in place: x [B, T, heads, hd] by cos, sin [B or 1, 1, T, hd]."""
    half = x.shape[-1] // 2
    cos, sin = (table.transpose(1, 2)[..., :half] for table in (cos, sin))  # [B or 1, T, 1, hd/2]
    x1, x2 = x.split(half, dim=-1)
    turned = x1 * sin
    x1.mul_(cos).addcmul_(x2, sin, value=-1)
    x2.mul_(cos).add_(turned)


class _Attend(Function):
    """Causal attention, q [B, heads, T, hd], k and v [B, KV, T, hd] → [B, T, heads · hd].

    Queries in blocks; each meets the keys up to its end. Those of one group are rows (t, head) of one matrix.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, heads, time, width), groups = q.shape, k.shape[1]
        each = heads // groups
        q = q.unflatten(1, (groups, each)).transpose(2, 3).reshape(batch * groups, time * each, width)
        k, v = (tensor.reshape(batch * groups, time, width) for tensor in (k, v))
        out, kept, scale = torch.empty_like(q), [], width**-0.5
        ahead = q.new_full((BLOCK, BLOCK), -math.inf).triu_(1)[:, None]  # [n, 1, n], of keys that are hidden
        for rows, begin, end in _blocks(time, each):
            weights = torch.baddbmm(q.new_empty(()), q[:, rows], k[:, :end].mT, beta=0, alpha=scale)
            weights.view(len(q), -1, each, end)[..., begin:].add_(ahead[: end - begin, :, : end - begin])
            torch.ops.aten._softmax.out(weights, -1, False, out=weights)  # [B·KV, n·each, end]
            out[:, rows] = torch.bmm(weights, v[:, :end])
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(batch, groups, time, each, width).transpose(1, 2).reshape(batch, time, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *kept = ctx.saved_tensors
        (batch, time, _), width = dout.shape, q.shape[-1]
        each, scale = q.shape[1] // time, width**-0.5
        dout = dout.view(batch, time, -1, each, width).transpose(1, 2).reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for weights, (rows, _, end) in zip(kept, _blocks(time, each), strict=True):
            dv[:, :end].baddbmm_(weights.mT, dout[:, rows])
            flow = torch.bmm(dout[:, rows], v[:, :end].mT)
            torch.ops.aten._softmax_backward_data.out(flow, weights, -1, flow.dtype, grad_input=flow)
            dq[:, rows] = torch.bmm(flow, k[:, :end]).mul_(scale)
            dk[:, :end].baddbmm_(flow.mT, q[:, rows], alpha=scale)
        dq = dq.view(batch, -1, time, each, width).transpose(2, 3).flatten(1, 2)
        return dq, *(grad.unflatten(0, (batch, -1)) for grad in (dk, dv))


def _blocks(time: int, each: int) -> Iterator[tuple[slice, int, int]]:
    """The rows of each block of queries, its begin and its end."""
    for begin in range(0, time, BLOCK):
        end = min(begin + BLOCK, time)
        yield slice(begin * each, end * each), begin, end
