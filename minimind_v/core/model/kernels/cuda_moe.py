"""Mixture of experts on a GPU: the tokens of all experts in one product; the host need not know its sizes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_v.core.model.kernels.cuda_linear import computing_dtype
from minimind_v.core.model.kernels.untouched import exactly_linear, unhooked
from minimind_v.core.model.moe import MoEFeedForward

GROUPED_ON = (9, 10)  # compute capabilities on which torch's grouped product is one kernel: Hopper, Blackwell


class GroupedExperts(MoEFeedForward):
    """MoEFeedForward whose experts are multiplied together where that is one kernel."""

    def apply_experts(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """Each token's expert applied to it: x [n, D], sorted by the number of its expert [n] → [n, D]."""
        experts: list[Any] = list(self.experts)
        linears = [linear for expert in experts for linear in expert.children()]
        exact = exactly_linear(*linears) and unhooked(experts)
        if not exact or not is_grouped(x, *linears[0].weight.shape):
            return super().apply_experts(x, expert_ids)
        numbers = torch.arange(len(experts), device=x.device)
        ends = torch.searchsorted(expert_ids, numbers, right=True, out_int32=True)  # [E]

        def multiply(x: Tensor, name: str) -> Tensor:
            weights = torch.stack([getattr(expert, name).weight.to(x.dtype) for expert in experts])  # [E, out, in]
            return F.grouped_mm(x, weights.mT, offs=ends)  # [n, out]

        x = x.to(computing_dtype(x))
        return multiply(F.silu(multiply(x, "gate_proj")) * multiply(x, "up_proj"), "down_proj")


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
