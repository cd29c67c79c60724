"""The description of a model beside its weights: write it, read it, and infer it where it is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from minimind_v.core.config.generation import V2026
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schema import ModelConfig, TextConfig, VisionSpec
from minimind_v.core.errors import UsageError, WeightsError
from minimind_v.core.files import object_in
from minimind_v.core.formats.companions import RECORD
from minimind_v.core.formats.generations import has_head_norms
from minimind_v.core.model.projector import PREFIX, PROJECTORS, projected, recognise_projector
from minimind_v.core.model.vision.spec import trouble_of_colours

EMBEDDING = "model.embed_tokens.weight"
# Shapes of tensors decide these, so a description must agree.
_SHAPED = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "use_moe", "qk_norm")
_SHAPED_EXPERTS = ("n_routed_experts", "n_shared_experts")
# Of minimind-3v no shape gives these: all published models have the same.
_UNSHAPED_3V = ("qk_norm", "rms_norm_eps", "num_experts_per_tok", "n_shared_experts", "aux_loss_alpha",
                "aux_loss_scope")  # fmt: skip


def _of_other_weights(path: Path, trouble: str) -> WeightsError:
    name = "config.json" if path.is_dir() else path.with_suffix(".json").name
    return WeightsError(
        f"{path}: the description beside it belongs to other weights ({trouble}) — is {name} from an older file? "
        "Without it, sizes are read from the tensors"
    )


def infer_config(path: Path, tensors: Mapping[str, Tensor]) -> TextConfig:
    """Sizes of the language model, from the shapes of its tensors.

    Raises WeightsError where the tensors are not those of a MiniMind model.
    """
    try:
        if not all(tensor.numel() for tensor in tensors.values()):
            raise ValueError("a tensor is empty")
        vocab, hidden = tensors[EMBEDDING].shape
        moe = "model.layers.0.mlp.gate.weight" in tensors
        ff = "model.layers.0.mlp." + ("experts.0." if moe else "") + "gate_proj.weight"
        return TextConfig(
            hidden_size=hidden,
            num_hidden_layers=_count_layers(tensors),
            intermediate_size=tensors[ff].shape[0],
            vocab_size=vocab,
            **(_infer_heads(tensors, hidden) | (_count_experts(tensors) if moe else {})),
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError, UsageError):
        names = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise WeightsError(f"{path}: not the weights of a MiniMind model (it contains {names} …)") from None


def _infer_heads(tensors: Mapping[str, Tensor], hidden: int) -> dict[str, Any]:
    """The heads, and what all models with such heads have in common.

    The norms of minimind-3v are as wide as a head. Of 2025 no shape gives the number of heads; all published models
    have two key-value heads, so two are taken.
    """
    attention = "model.layers.0.self_attn."
    kv_width = tensors[f"{attention}k_proj.weight"].shape[0]
    if not has_head_norms(tensors):
        return {"num_attention_heads": max(1, hidden * 2 // kv_width), "num_key_value_heads": 2}
    width = len(tensors[f"{attention}q_norm.weight"])
    published = {name: getattr(PRESETS[V2026.preset], name) for name in _UNSHAPED_3V}
    return published | {"num_attention_heads": hidden // width, "num_key_value_heads": kv_width // width}


def _count_layers(tensors: Mapping[str, Tensor]) -> int:
    numbers = {int(name.split(".")[2]) for name in tensors if re.match(r"model\.layers\.\d+\.", name)}
    if numbers != set(range(len(numbers))):
        raise ValueError("layers are missing")
    return len(numbers)


def _count_experts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    routed = tensors["model.layers.0.mlp.gate.weight"].shape[0]
    shared_numbers = {name.split(".")[5] for name in tensors if name.startswith("model.layers.0.mlp.shared_experts.")}
    return {
        "use_moe": True,
        "n_routed_experts": routed,
        "n_shared_experts": len(shared_numbers),
        "num_experts_per_tok": min(1 if has_head_norms(tensors) else TextConfig.num_experts_per_tok, routed),
    }


def shaped_sizes(config: TextConfig) -> dict[str, Any]:
    """The settings that shapes of tensors decide."""
    names = (*_SHAPED, *(_SHAPED_EXPERTS if config.use_moe else ()))
    return {name: getattr(config, name) for name in names}


def described_config(path: Path, meta: dict[str, Any], inferred: TextConfig) -> TextConfig:
    """The described sizes, else the inferred ones. Raises WeightsError where the description is of other weights."""
    names = {item.name for item in fields(TextConfig)}
    described = {name: value for name, value in meta.get("model", {}).items() if name in names}
    try:
        config = TextConfig(**(asdict(inferred) | described))
        wrong = [
            f"{name} {getattr(config, name)}, not {value}"
            for name, value in shaped_sizes(inferred).items()
            if getattr(config, name) != value
        ]
        if config.num_key_value_heads * config.head_dim != inferred.num_key_value_heads * inferred.head_dim or (
            config.qk_norm and config.head_dim != inferred.head_dim
        ):
            wrong.append("heads have another width")
    except (TypeError, UsageError) as error:
        wrong = [str(error)]
    if wrong:
        raise _of_other_weights(path, "; ".join(wrong))
    return config


def described_vision(path: Path, meta: dict[str, Any]) -> VisionSpec | None:
    """The described vision tower. Raises WeightsError where the description is invalid."""
    described = object_in(meta, "vision")
    values = {item.name: described[item.name] for item in fields(VisionSpec) if item.name in described}
    if not values:
        return None
    for name in ("mean", "std"):
        values[name] = tuple(values[name]) if isinstance(values.get(name), list) else ()
    try:
        trouble = trouble_of_colours(values["mean"], values["std"])
        spec = VisionSpec(**values)
    except (TypeError, UsageError) as error:
        trouble = str(error)
    if trouble:
        raise _of_other_weights(path, f"vision tower: {trouble}")
    return spec


def described_projector(path: Path, meta: dict[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """The described projector, None without one. Raises WeightsError where the tensors are not of that kind."""
    described = object_in(meta, "projector").get("type")
    if not isinstance(described, str) or not any(name.startswith(PREFIX) for name in tensors):
        return None
    if described in PROJECTORS and PROJECTORS[described].vision_width(tensors) is None:
        recognised = recognise_projector(tensors)
        kind = f"of {recognised!r}" if recognised else f"of another kind, none of {', '.join(PROJECTORS)}"
        raise _of_other_weights(path, f"it names the projector {described!r}, the tensors are those {kind}")
    return described


def describe(config: ModelConfig | TextConfig, stage: str, record: Mapping[str, Any] | None = None) -> str:
    """The JSON text beside weights, with what their shapes do not give. A text-only base is a TextConfig."""
    if isinstance(config, TextConfig):
        described: dict[str, Any] = {"stage": stage, "model": asdict(config)}
    else:
        tokens = projected(config.vision, config.projector).tokens_per_image
        described = {"stage": stage, "model": asdict(config.text), "vision": asdict(config.vision),
                     "projector": {"type": config.projector, "tokens_per_image": tokens}}  # fmt: skip
    return json.dumps(described | ({RECORD: record} if record else {}), indent=1)
