"""Linear layers on a GPU under autocast: a frozen weight is cast once, not at every call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.model.kernels.cpu_linear import state_of


class CudaLinear(nn.Linear):
    """Linear. Autocast itself keeps the cast of a trainable weight for a forward pass, and that of a frozen one never.

    The weight stays as it is, and so do checkpoints. The cast is made again after the weight was written to.
    """

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        dtype = computing_dtype(input)
        trains = any(parameter.requires_grad for parameter in parameters)
        if trains or dtype == self.weight.dtype or torch.compiler.is_compiling():
            return super().forward(input)
        return F.linear(input, *self._cast(parameters, dtype))

    def _cast(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        state = dtype, state_of(parameters)
        kept = vars(self).get("_kept")
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # a backward pass may need it too
                kept = self._kept = state, [parameter.to(dtype) for parameter in parameters]
        casts: list[Tensor] = kept[1]
        return casts


def computing_dtype(x: Tensor) -> torch.dtype:
    """The type that products of x are computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
