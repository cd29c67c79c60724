"""Apply a freeze policy: what trains and what does not."""

from __future__ import annotations

from torch import nn

from minimind_v.core.config.freeze import FREEZE_POLICIES
from minimind_v.core.model.kernels.accelerate import cast_frozen_once
from minimind_v.core.model.vlm import VLM


def freeze(model: VLM, policy: str) -> list[nn.Parameter]:
    """Apply one of FREEZE_POLICIES to a model that has its weights; returns the trainable parameters, each once."""
    chosen, layers = FREEZE_POLICIES[policy], model.config.num_hidden_layers
    chosen.prepare(model)
    for name, parameter in model.named_parameters():
        trainable = name.startswith("vision_proj.") or chosen.trains(name, layers)
        parameter.requires_grad_(trainable and not name.startswith("vision_encoder."))
    cast_frozen_once(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
