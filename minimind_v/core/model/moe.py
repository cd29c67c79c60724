"""Mixture of experts: its top-k routed experts and the shared ones, if any, work on every token.

The block of 2025 follows DeepSeekMoE (Dai et al., 2024); that of minimind-3v, without shared experts, is Qwen3-MoE's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.model import ops
from minimind_v.core.model.feed_forward import FeedForward


class Router(nn.Module):
    """Chooses experts: softmax over weight @ x, the k best, renormalised to sum 1. The key is `mlp.gate.weight`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] → probabilities [..., E], weights [..., k], chosen experts [..., k]."""
        probs = F.linear(x, self.weight).float().softmax(dim=-1)
        top, chosen = probs.topk(self.top_k, dim=-1, sorted=False)
        return probs, top / (top.sum(dim=-1, keepdim=True) + 1e-20), chosen


class MoEFeedForward(nn.Module):
    """Routed and shared experts in place of one FeedForward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.alpha, self.scope = config.aux_loss_alpha, config.aux_loss_scope
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        self.gate = Router(config)
        self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_shared_experts))

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] → output [B, T, D] and, in training, the auxiliary loss (a scalar).

        With `positions` [S] in the flattened batch, the output [S, D] of these alone; the loss is of all tokens.
        """
        probs, weights, chosen = self.gate(x)  # [B, T, E], [B, T, k], [B, T, k]
        aux_loss = self.balance_loss(probs, chosen, attention_mask) if self.training else None
        x, weights, chosen = (ops.select(tensor, positions) for tensor in (x, weights, chosen))
        tokens = x.flatten(0, -2)  # [N, D]
        # Sort the N·k picks by expert, so that each works on a slice of just its own tokens; add back.
        expert_ids, order = chosen.flatten().sort(stable=True)  # [N·k]
        token_ids = order // chosen.shape[-1]
        share = weights.flatten().index_select(0, order)[:, None]  # [N·k, 1]
        y = self.apply_experts(tokens.index_select(0, token_ids), expert_ids) * share  # [N·k, D]
        out = torch.zeros_like(tokens).index_add_(0, token_ids, y.to(tokens.dtype))
        for expert in self.shared_experts:
            out = out + expert(tokens)
        return out.view_as(x), aux_loss

    def apply_experts(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """Each token's expert applied to it: x [n, D], sorted by the number of its expert [n] → [n, D]."""
        counts = expert_ids.bincount(minlength=len(self.experts)).tolist()
        slices = x.split(counts)
        return torch.cat([expert(tokens) for expert, tokens in zip(self.experts, slices, strict=True)])

    def balance_loss(self, probs: Tensor, chosen: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Alpha · mean over rows of Σ_e f_e·P_e, padding left out so that the loss does not depend on it.

        f_e: share of the row's picks that went to expert e, times E; P_e: mean probability of e. With the scope
        "batch", all tokens are one row (Fedus et al., 2021). probs [B, T, E], chosen [B, T, k].
        """
        n_routed, top_k = probs.shape[-1], chosen.shape[-1]
        picks = F.one_hot(chosen, n_routed).sum(dim=2).float()  # [B, T, E]
        keep = torch.ones_like(probs[..., 0]) if attention_mask is None else attention_mask.float()  # [B, T]
        if self.scope == "batch":
            picks, probs, keep = (tensor.flatten(0, 1)[None] for tensor in (picks, probs, keep))  # B = 1
        length = keep.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]
        f = (picks * keep[..., None]).sum(dim=1) / (length * top_k) * n_routed  # [B, E]
        p = (probs * keep[..., None]).sum(dim=1) / length  # [B, E]
        return self.alpha * (f * p).sum(dim=1).mean()
