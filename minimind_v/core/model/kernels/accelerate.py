"""Replace the modules of the plain model by faster ones for a device.

A module becomes one of a subclass that computes the same: its parameters, names, hooks and copies stay, and a kernel
that does not apply (a wrapped Linear, another dtype, no gradient) calls the plain code. Experts on a GPU also change
where their weights are stored, but not the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from minimind_v.core.model import ops
from minimind_v.core.model.decoder import Attention, RMSNorm
from minimind_v.core.model.feed_forward import FeedForward
from minimind_v.core.model.kernels import apple
from minimind_v.core.model.kernels.apple import AppleAttention, AppleClipAttention, AppleRMSNorm
from minimind_v.core.model.kernels.cpu_clip import CpuClipVision, CpuSiglipVision
from minimind_v.core.model.kernels.cpu_training import CpuAttention, CpuFeedForward, CpuRMSNorm
from minimind_v.core.model.kernels.cuda_linear import CudaLinear
from minimind_v.core.model.kernels.cuda_moe import GroupedExperts
from minimind_v.core.model.moe import MoEFeedForward
from minimind_v.core.model.vision.clip import ClipAttention, ClipVision
from minimind_v.core.model.vision.siglip import SiglipVision

FAST: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "cpu": {
        Attention: CpuAttention,
        FeedForward: CpuFeedForward,
        RMSNorm: CpuRMSNorm,
        ClipVision: CpuClipVision,
        SiglipVision: CpuSiglipVision,
    },
    "cuda": {MoEFeedForward: GroupedExperts},
    "mps": {Attention: AppleAttention, RMSNorm: AppleRMSNorm, ClipAttention: AppleClipAttention},
}
_PLAIN = {fast: slow for modules in FAST.values() for slow, fast in modules.items()} | {CudaLinear: nn.Linear}

Module = TypeVar("Module", bound=nn.Module)


def accelerate(model: Module, device: torch.device) -> Module:
    """Make the modules of a model on this device fast; returns the model. Subclasses of other packages stay plain."""
    plain(model)
    _replace(model, FAST.get(device.type, {}))
    for experts in _grouped(model):
        experts.stack()
    return model


def plain(model: Module) -> Module:
    """Undo `accelerate`; returns the model."""
    for experts in _grouped(model):
        experts.unstack()
    _replace(model, _PLAIN)
    return model


def cast_frozen_once(model: nn.Module) -> None:
    """Let frozen Linears on a GPU keep their casts. Call it when all modules are in place: their class changes."""
    for module in model.modules():
        frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if type(module) is nn.Linear and module.weight.device.type == "cuda" and frozen:
            module.__class__ = CudaLinear


def attention_for(device: torch.device) -> Callable[..., Tensor]:
    """`ops.attention`, or the same function for this device."""
    return apple.attention if device.type == "mps" else ops.attention


def _grouped(model: nn.Module) -> list[GroupedExperts]:
    return [module for module in model.modules() if type(module) is GroupedExperts]


def _replace(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
