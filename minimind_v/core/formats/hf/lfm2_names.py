"""Names and sizes of transformers' LFM2-VL that holds a model of minimind-3v: published ones and its own.

| published                                | LFM2-VL                                                       |
|------------------------------------------|---------------------------------------------------------------|
| `model.…`                                | `model.language_model.…`, experts included                    |
| `lm_head.weight` (tied)                  | not stored: tied                                              |
| `vision_proj.mlp.{0,1,3}.…`              | `model.multi_modal_projector.{layer_norm,linear_1,linear_2}.…` |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.files import object_in
from minimind_v.core.formats.hf.names import EMBEDDING, HEAD, PROJECTOR, TEXT
from minimind_v.core.model.projector import PREFIX

MODEL_TYPE = "lfm2_vl"
SIGLIP2 = "siglip2_vision_model"
_PROJECTOR = {"mlp.0.": "layer_norm.", "mlp.1.": "linear_1.", "mlp.3.": "linear_2."}


def to_lfm2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors → the text model and the projector of an LFM2-VL, in their own types."""
    return {_transformers_name(name): tensor for name, tensor in tensors.items() if name != HEAD}


def _transformers_name(name: str) -> str:
    for ours, theirs in _PROJECTOR.items():
        if name.startswith(PREFIX + ours):
            return PROJECTOR + theirs + name.removeprefix(PREFIX + ours)
    return TEXT + name.removeprefix("model.")


def from_lfm2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text model and the projector of an LFM2-VL → published tensors. Raises KeyError for a missing embedding."""
    published: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(PROJECTOR)
        layer = next((layer for layer in _PROJECTOR.items() if plain.startswith(layer[1])), None)
        if name.startswith(PROJECTOR) and layer:
            published[PREFIX + layer[0] + plain.removeprefix(layer[1])] = tensor
        elif name.startswith(TEXT):
            published["model." + name.removeprefix(TEXT)] = tensor
        else:
            published[name] = tensor
    if HEAD not in published:
        published[HEAD] = published[f"model.{EMBEDDING}"]
    return published


def described_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes in an LFM2-VL's configuration, by the names of TextConfig."""
    text = object_in(config, "text_config")
    sizes = {name: text[name] for name in TextConfig.__dataclass_fields__ if text.get(name) is not None}
    theta = object_in(text, "rope_parameters").get("rope_theta", text.get("rope_theta"))
    sizes |= {"qk_norm": True, **({} if theta is None else {"rope_theta": theta})}
    if text.get("model_type") == "qwen3_moe":
        experts = {
            "n_routed_experts": text.get("num_local_experts", text.get("num_experts")),
            "intermediate_size": text.get("moe_intermediate_size"),
            "aux_loss_alpha": text.get("router_aux_loss_coef"),
        }
        sizes |= {"use_moe": True} | {name: value for name, value in experts.items() if value is not None}
    return sizes
