"""Linear layers on a GPU under autocast: a frozen weight is cast once, not at every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.model.kernels.cpu_linear import state_of

Cast = TypeVar("Cast")


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
        casts = keep_cast(self, "linear", parameters, lambda: [tensor.to(dtype) for tensor in parameters], dtype)
        return F.linear(input, *casts)


def keep_cast(
    module: nn.Module, name: str, parameters: Sequence[Tensor], cast: Callable[[], Cast], dtype: torch.dtype
) -> Cast:
    """A cast of frozen parameters to a type, which a module keeps by name until one of them is written to."""
    state, kept = (dtype, state_of(parameters)), vars(module).setdefault("_kept", {})
    if name not in kept or kept[name][0] != state:
        with torch.inference_mode(False), torch.no_grad():  # a backward pass may need it too
            kept[name] = state, cast()
    result: Cast = kept[name][1]
    return result


def computing_dtype(x: Tensor) -> torch.dtype:
    """The type that products of x are computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
