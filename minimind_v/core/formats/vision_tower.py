"""Read a vision tower from its folder: tensors that stay in their files, without modules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_v.core.errors import WeightsError
from minimind_v.core.formats.hf.read import weight_files
from minimind_v.core.formats.tensor_files import check_numbers, read_tensors
from minimind_v.core.model.no_init import NoInit
from minimind_v.core.model.vision.clip import ACTIVATIONS
from minimind_v.core.model.vision.encoder import VisionEncoder
from minimind_v.core.model.vision.spec import (
    TowerType,
    VisionSpec,
    does_not_load,
    read_tower_config,
    read_vision_spec,
)
from minimind_v.core.wording import plural

_OTHERS = ("text_model.", "text_projection", "visual_projection", "logit_scale", "language_model.",
           "multi_modal_projector.", "lm_head.", "model.language_model.", "model.multi_modal_projector.")  # fmt: skip
_LAYERS = "encoder.layers."
PATCHES = "embeddings.patch_embedding.weight"


@dataclass(frozen=True)
class StoredTower:
    """A whole vision tower. `tensors` have the names and shapes of the module that `kind` builds."""

    kind: TowerType
    config: Any
    spec: VisionSpec
    tensors: dict[str, Tensor]


def read_tower(folder: Path, spec: VisionSpec | None = None) -> StoredTower:
    """The tower in its own folder, a whole CLIP's, or a LLaVA's; `spec` is what `read_vision_spec` has read there.

    Raises MissingInput or WeightsError.
    """
    spec = spec or read_vision_spec(folder)
    kind, config = read_tower_config(folder)
    activation = getattr(config, "hidden_act", None)
    if activation is not None and activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        why = f"its activation {activation!r} is not one of {names}"
        raise WeightsError(does_not_load(folder, why, spec.model_type))
    try:
        tensors = _read(folder, kind)
    except WeightsError as error:
        why, _, _ = str(error).removeprefix(f"{folder}").lstrip("/: ").partition(" — ")
        raise WeightsError(does_not_load(folder, why, spec.model_type)) from None
    stored = StoredTower(kind, config, spec, tensors)
    if trouble := _trouble_of_tensors(folder, stored):
        raise WeightsError(does_not_load(folder, trouble, spec.model_type))
    return replace(stored, tensors={name: tensors[name] for name in tower_shapes(kind, config)})


def build_encoder(tower: StoredTower) -> VisionEncoder:
    """The vision encoder of a stored tower, with its weights in fp32."""
    with NoInit():
        module = tower.kind.build(tower.config)
    module.load_state_dict({name: tensor.float() for name, tensor in tower.tensors.items()}, assign=True)
    return VisionEncoder(module, tower.spec)


def load_encoder(folder: Path) -> VisionEncoder:
    """The vision encoder in a folder. Raises as `read_tower`."""
    return build_encoder(read_tower(folder))


def _read(folder: Path, kind: TowerType) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= {kind.rename(name): tensor for name, tensor in read_tensors(file, _OTHERS)[0].items()}
    patches = tensors.get(PATCHES)
    if patches is not None and patches.ndim == 2 and patches.shape[1] % 3 == 0:
        side = isqrt(patches.shape[1] // 3)
        if 3 * side * side == patches.shape[1]:  # SigLIP2's convolution: a linear layer over row, column and channel
            tensors[PATCHES] = patches.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)  # [D, 3, p, p]
    return tensors


def _trouble_of_tensors(folder: Path, tower: StoredTower) -> str | None:
    """Why the tensors of a tower do not load; None where they do. Those that features do not depend on are added."""
    tensors, shapes = tower.tensors, tower_shapes(tower.kind, tower.config)
    add_unused(tensors, tower.kind, shapes)
    if missing := [name for name in shapes if name not in tensors]:
        return f"{len(missing)} tensors of the vision model are missing, the first is {missing[0]}"
    if further := [name for name in tensors if name.startswith(_LAYERS) and name not in shapes]:
        return f"it contains {further[0]}, but config.json has {plural(tower.config.num_hidden_layers, 'layer')}"
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            return f"{name} is {list(tensors[name].shape)}, but config.json says {list(shape)}"
        check_numbers(folder, name, tensors[name])
    return None


def add_unused(tensors: dict[str, Tensor], kind: TowerType, shapes: dict[str, torch.Size]) -> None:
    """Add the missing tensors of norms that features do not depend on, as those of a new norm."""
    for name, shape in shapes.items():
        if name.startswith(kind.unused) and name not in tensors:
            tensors[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)


def tower_shapes(kind: TowerType, config: Any) -> dict[str, torch.Size]:
    """The name and shape of each tensor of a tower, without taking memory."""
    with NoInit(), torch.device("meta"):
        return {name: tensor.shape for name, tensor in kind.build(config).state_dict().items()}
