"""The feed-forward layer of a block."""

from __future__ import annotations

from torch import Tensor, nn

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.model import ops


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer, 2020)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D]."""
        inner: Tensor = ops.swiglu(self.gate_proj(x), self.up_proj(x))  # [..., I]
        return self.down_proj(inner)
