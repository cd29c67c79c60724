"""Mixture of experts: every token is worked on by its top-k routed experts and by the shared ones.

Follows the published MiniMind block, which follows DeepSeekMoE (Dai et al., 2024).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.model.kernels.cpu_training import computing, feed_forward

GROUPED_ON = (
    9,
    10,
)  # compute capabilities on which torch's grouped product is one kernel: Hopper, data-centre Blackwell


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer, 2020). [..., D] → [..., D]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = (proj.weight for proj in (self.gate_proj, self.up_proj, self.down_proj))
        return feed_forward(x.flatten(0, -2), *weights).view_as(x)


def pick(x: Tensor, positions: Tensor, last: int = 1) -> Tensor:
    """Those at positions [S] of x [B, T, ...], whose dimensions from 0 to `last` are counted as one: [S, ...]."""
    return x.flatten(0, last).index_select(0, positions)


def grouped(x: Tensor, *widths: int) -> bool:
    """Whether torch multiplies every expert's tokens in one kernel: in bf16 on such a GPU, with rows of whole 16 bytes.

    On others its `grouped_mm` is a loop that waits for the GPU more often than the one here.
    """
    return (
        x.device.type == "cuda"
        and len(x) > 0
        and computing(x) == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device)[0] in GROUPED_ON
        and not any(width % 8 for width in widths)
    )


class Router(nn.Module):
    """Chooses experts: softmax over weight @ x, the k best, renormalised to sum 1. The key is `mlp.gate.weight`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, D] → probabilities [N, E], weights [N, k], chosen experts [N, k]."""
        probs = F.linear(x, self.weight).float().softmax(dim=-1)
        top, chosen = probs.topk(self.top_k, dim=-1, sorted=False)
        return probs, top / (top.sum(dim=-1, keepdim=True) + 1e-20), chosen


class MoEFeedForward(nn.Module):
    """Routed and shared experts in the place of one FeedForward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.alpha = config.aux_loss_alpha
        self.widths = config.hidden_size, config.intermediate_size
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        self.gate = Router(config)
        self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_shared_experts))

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] → output [B, T, D] and, while training, the auxiliary loss (a scalar).

        With the positions `read` [S] of some tokens in the flattened batch the output is [S, D], of these alone.
        """
        flat = x.flatten(0, 1)  # [N, D]
        probs, weights, chosen = self.gate(flat)
        aux = self._balance(probs, chosen, x.shape[:2], attention_mask) if self.training else None
        if read is None:
            return self._work(flat, weights, chosen).view_as(x), aux
        return self._work(*(pick(part, read, 0) for part in (flat, weights, chosen))), aux

    def _work(self, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Tokens [N, D], the weights of their experts and these [N, k] → [N, D]."""
        # Sort the N·k picks by expert, so that each works on a slice of just its own tokens; add back.
        numbers, order = chosen.flatten().sort(stable=True)  # [N·k]
        token = order // chosen.shape[1]
        if grouped(flat, *self.widths):
            y = self._work_at_once(flat[token], numbers)
        else:
            counts = numbers.bincount(minlength=len(self.experts)).tolist()
            parts = zip(self.experts, flat[token].split(counts), strict=True)
            y = torch.cat([expert(part) for expert, part in parts])
        y = y * weights.flatten()[order, None]  # [N·k, D]
        out = torch.zeros_like(flat).index_add_(0, token, y.to(flat.dtype))
        for shared in self.shared_experts:
            out = out + shared(flat)
        return out

    def _work_at_once(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Tokens x [n, D] in the order of their experts' numbers [n] → [n, D]. The host need not know these."""
        experts: list[Any] = list(self.experts)
        ends = torch.searchsorted(numbers, torch.arange(len(experts), device=x.device), right=True, out_int32=True)

        def product(x: Tensor, name: str) -> Tensor:
            weights = torch.stack([getattr(expert, name).weight.to(x.dtype) for expert in experts])
            return F.grouped_mm(x, weights.mT, offs=ends)  # [E, out, in] → [n, out]

        x = x.to(computing(x))
        return product(F.silu(product(x, "gate_proj")) * product(x, "up_proj"), "down_proj")

    def _balance(self, probs: Tensor, chosen: Tensor, shape: torch.Size, mask: Tensor | None) -> Tensor:
        """Alpha · mean over sequences of Σ_e f_e·P_e, padding left out so that the loss does not depend on it."""
        n_routed = probs.shape[-1]
        picks = F.one_hot(chosen, n_routed).sum(dim=1).float().view(*shape, n_routed)  # [B, T, E]
        probs = probs.view(*shape, n_routed)  # [B, T, E]
        keep = torch.ones(shape, device=probs.device) if mask is None else mask.float()  # [B, T]
        length = keep.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]
        f = (picks * keep[..., None]).sum(dim=1) / (length * chosen.shape[-1]) * n_routed  # [B, E]
        p = (probs * keep[..., None]).sum(dim=1) / length  # [B, E]
        return self.alpha * (f * p).sum(dim=1).mean()
