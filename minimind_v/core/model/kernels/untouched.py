"""Whether a kernel may replace calls of modules: only if those would do nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from minimind_v.core.model.kernels.cuda_linear import CudaLinear


def unhooked(modules: Iterable[nn.Module]) -> bool:
    """No module has a hook, or a forward of its own."""
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        for module in modules
    )


def exactly_linear(*modules: nn.Module) -> bool:
    """Each is a Linear of torch or a CudaLinear, unhooked: one that was wrapped or replaced (LoRA) must be called."""
    return all(type(module) in (nn.Linear, CudaLinear) for module in modules) and unhooked(modules)
