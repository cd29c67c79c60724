"""Mixture of experts on a GPU: the tokens of all experts in one product; the host need not know its sizes.

Such a product needs the weights of all experts as one tensor in bf16. They are stored one behind another in fp32, so
that one kernel casts them; parameters, their names, checkpoints and AdamW do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_v.core.model.kernels.cuda_linear import computing_dtype, keep_cast
from minimind_v.core.model.kernels.untouched import exactly_linear, unhooked
from minimind_v.core.model.moe import MoEFeedForward

GROUPED_ON = (9, 10)  # compute capabilities on which torch's grouped product is one kernel: Hopper, Blackwell
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class GroupedExperts(MoEFeedForward):
    """MoEFeedForward whose experts are multiplied together where that is one kernel."""

    def apply_experts(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """Each token's expert applied to it: x [n, D], sorted by the number of its expert [n] → [n, D]."""
        exact = self._has_linears() and unhooked(self.experts)
        if not exact or not is_grouped(x, *self._weights("gate_proj")[0].shape):
            return super().apply_experts(x, expert_ids)
        numbers = torch.arange(len(self.experts), device=x.device)
        ends = torch.searchsorted(expert_ids, numbers, right=True, out_int32=True)  # [E]
        x = x.to(computing_dtype(x))
        gate, up, down = (self._stacked(name, x.dtype).mT for name in PROJECTIONS)  # [E, in, out]
        inner = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)  # [n, I]
        return F.grouped_mm(inner, down, offs=ends)

    def stack(self) -> None:
        """Store the weights of all experts one behind another: each parameter becomes a view of them."""
        for weights in self._movable():
            for weight, view in zip(weights, torch.stack([weight.detach() for weight in weights]), strict=True):
                weight.data = view

    def unstack(self) -> None:
        """Store each weight by itself again."""
        for weights in self._movable():
            for weight in weights:
                weight.data = weight.detach().clone()

    def _stacked(self, name: str, dtype: torch.dtype) -> Tensor:
        """The weights of all experts in the type of a product, [E, out, in]."""
        weights = self._weights(name)
        if any(weight.requires_grad for weight in weights) or torch.compiler.is_compiling():
            return stacked(weights, dtype)
        return keep_cast(self, name, weights, lambda: stacked(weights, dtype), dtype)

    def _weights(self, name: str) -> list[Tensor]:
        experts: list[Any] = list(self.experts)
        return [getattr(expert, name).weight for expert in experts]

    def _has_linears(self) -> bool:
        return exactly_linear(*(linear for expert in self.experts for linear in expert.children()))

    def _movable(self) -> Iterator[list[Tensor]]:
        """The weights of each projection, unless one was wrapped or moved to another device or type."""
        for weights in map(self._weights, PROJECTIONS) if self._has_linears() else ():
            if len({(weight.shape, weight.dtype, weight.device) for weight in weights}) == 1:
                yield weights


@torch.library.custom_op(
    "minimind_v::stacked", mutates_args=(), schema="(Tensor[] weights, ScalarType dtype) -> Tensor"
)
def stacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights [out, in] as one new tensor [E, out, in] of this type: by one kernel where they lie behind another.

    Where they lie is looked up at each call, also where a compiler made the rest: a parameter may have been moved.
    """
    first = weights[0].detach()
    if all(_lies_behind(first, number, weight) for number, weight in enumerate(weights)):
        return first.as_strided((len(weights), *first.shape), (first.numel(), *first.stride())).to(dtype, copy=True)
    return torch.stack([weight.detach().to(dtype) for weight in weights])


def _lies_behind(first: Tensor, number: int, weight: Tensor) -> bool:
    """Whether a weight is the one of this number in the memory that begins with the first."""
    same_memory = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    same_form = weight.dtype == first.dtype and weight.shape == first.shape and weight.is_contiguous()
    return same_memory and same_form and weight.storage_offset() == first.storage_offset() + number * first.numel()


@stacked.register_fake
def _(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return weights[0].new_empty((len(weights), *weights[0].shape), dtype=dtype)


def _keep_dtype(ctx: Any, inputs: tuple[Sequence[Tensor], torch.dtype], output: Tensor) -> None:
    ctx.dtype = inputs[0][0].dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[list[Tensor], None]:
    """The gradient [E, out, in] cast as a whole, a view of it for each weight."""
    return list(gradient.to(ctx.dtype).unbind()), None


stacked.register_autograd(_gradients, setup_context=_keep_dtype)


def is_grouped(x: Tensor, *widths: int) -> bool:
    """Whether torch multiplies every expert's tokens in one kernel: in bf16 on such a GPU, with rows of whole 16 bytes.

    On others its `grouped_mm` is a loop that waits for the GPU more often than the plain one.
    """
    return (
        x.device.type == "cuda"
        and len(x) > 0
        and computing_dtype(x) == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device)[0] in GROUPED_ON
        and not any(width % 8 for width in widths)
    )
