"""What is to be exported as it is stored: tensors that stay in their files until they are written, and no modules.

Everything is checked to fit together by names and shapes. Reading needs no transformers, so it is quick and small; that
what was written computes the same is what verification proves, with the modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_v.core.checkpoint.folders import weight_files
from minimind_v.core.checkpoint.keys import published_shapes
from minimind_v.core.checkpoint.tensors import read_tensors
from minimind_v.core.checkpoint.weights import Checkpoint, fit, read_checkpoint
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import WeightsError
from minimind_v.core.export.order import Order
from minimind_v.core.generate.load import check_senses, find_senses
from minimind_v.core.gguf.files import is_gguf, read_eye, read_tokenizer
from minimind_v.core.hub.sources import how_to_get
from minimind_v.core.model.vision import VisionEncoder
from minimind_v.core.model.vision_spec import VisionSpec, read_json, read_vision_spec

# What decides what a CLIP vision tower computes, and what each is where a configuration leaves it out.
TOWER_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_OTHERS = ("text_model.", "text_projection", "visual_projection", "logit_scale", "language_model.",
           "multi_modal_projector.", "lm_head.", "model.language_model.", "model.multi_modal_projector.")  # fmt: skip
_PREFIXES = ("model.", "vision_tower.", "vision_model.")


@dataclass(frozen=True)
class Tower:
    """CLIP's vision tower: `config` has the names of TOWER_DEFAULTS, `tensors` those of transformers' module."""

    config: dict[str, Any]
    spec: VisionSpec
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """All parts of a model."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    tower: Tower


def read_source(order: Order) -> Source:
    """Read what `order` names. Raises MissingInput, or WeightsError where a part is damaged or does not fit."""
    checkpoint = read_checkpoint(order.model)
    vision_model, tokenizer = find_senses(order.model, order.vision_model, order.tokenizer)
    tower = _tower_of(read_eye(vision_model)) if is_gguf(vision_model) else read_tower(vision_model)
    words = read_tokenizer(tokenizer) if is_gguf(tokenizer) else Tokenizer.load(tokenizer)
    check_senses(checkpoint, words, tokenizer, tower.spec, vision_model)
    fit(checkpoint, published_shapes(checkpoint.config, tower.spec.width), checkpoint.config)
    return Source(checkpoint, words, tower)


def read_tower(folder: Path) -> Tower:
    """The tower in the folder of a CLIP, a CLIPVisionModel or a LLaVA. Raises MissingInput or WeightsError."""
    spec = read_vision_spec(folder)
    told = read_json(folder / "config.json") or {}
    told = told.get("vision_config", told)
    config = {name: told.get(name, default) for name, default in TOWER_DEFAULTS.items()}
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for name, tensor in read_tensors(file, _OTHERS)[0].items():
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
            tensors[name] = tensor
    return Tower(config, spec, _complete(folder, tensors, _tower_shapes(config)))


def _complete(folder: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of these shapes. The last norm may be missing: features are taken before it."""
    for part, make in (("weight", torch.ones), ("bias", torch.zeros)):
        name = f"post_layernorm.{part}"
        tensors.setdefault(name, make(shapes[name]))
    if missing := [name for name in shapes if name not in tensors]:
        raise WeightsError(
            f"{folder}: {len(missing)} tensors of the vision model are missing, the first is {missing[0]} "
            f"— {how_to_get('clip', folder)}"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise WeightsError(
                f"{folder}: the vision model does not load ({name} is {list(tensors[name].shape)}, and by config.json "
                f"{list(shape)}) — {how_to_get('clip', folder)}"
            )
    return {name: tensors[name] for name in shapes}


def _tower_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    wide, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    patches = (config["image_size"] // patch) ** 2
    found: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (wide,),
        "embeddings.patch_embedding.weight": (wide, config["num_channels"], patch, patch),
        "embeddings.position_embedding.weight": (patches + 1, wide),
    }
    linear: dict[str, tuple[int, ...]] = {f"self_attn.{part}_proj": (wide, wide) for part in ("q", "k", "v", "out")}
    linear |= {"mlp.fc1": (inner, wide), "mlp.fc2": (wide, inner), "layer_norm1": (wide,), "layer_norm2": (wide,)}
    every = {f"encoder.layers.{n}.{name}": shape for n in range(config["num_hidden_layers"])
             for name, shape in linear.items()}  # fmt: skip
    for name, shape in (every | {"pre_layrnorm": (wide,), "post_layernorm": (wide,)}).items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def _tower_of(encoder: VisionEncoder) -> Tower:
    """A tower that is a module already."""
    module: Any = encoder.tower
    config = {name: getattr(module.config, name) for name in TOWER_DEFAULTS}
    return Tower(config, encoder.spec, {
        name.removeprefix("vision_model."): tensor for name, tensor in module.state_dict().items()
    })  # fmt: skip
