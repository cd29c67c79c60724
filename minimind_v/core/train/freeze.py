"""What trains and what does not. CLIP never does."""

from __future__ import annotations

from torch import nn

from minimind_v.core.model.vlm import VLM


def freeze(model: VLM, policy: str) -> list[nn.Parameter]:
    """Apply a policy (one of config.schema.FREEZE_POLICIES); returns what trains, each tensor once."""
    last = f"model.layers.{model.config.num_hidden_layers - 1}."

    def trains(name: str) -> bool:
        if name.startswith("vision_encoder."):
            return False
        if name.startswith("vision_proj.") or policy == "all":
            return True
        if policy == "attention":
            return ".self_attn." in name
        return policy == "projector+last" and name.startswith(last)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
