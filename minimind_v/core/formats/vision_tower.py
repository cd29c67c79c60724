"""A CLIP vision tower as it lies in its folder: tensors that stay in their files, and no modules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minimind_v.core.errors import WeightsError
from minimind_v.core.formats.generations import check_tower
from minimind_v.core.formats.hf.read import weight_files
from minimind_v.core.formats.tensor_files import check_numbers, read_tensors
from minimind_v.core.hub.sources import how_to_get
from minimind_v.core.model.no_init import NoInit
from minimind_v.core.model.vision.clip import ACTIVATIONS, ClipVision
from minimind_v.core.model.vision.encoder import VisionEncoder
from minimind_v.core.model.vision.spec import ClipConfig, VisionSpec, does_not_load, read_config, read_vision_spec

_OTHERS = ("text_model.", "text_projection", "visual_projection", "logit_scale", "language_model.",
           "multi_modal_projector.", "lm_head.", "model.language_model.", "model.multi_modal_projector.")  # fmt: skip
_LAYERS = "encoder.layers."
_PREFIXES = ("model.", "vision_tower.", "vision_model.")


@dataclass(frozen=True)
class Tower:
    """All that a tower is: `tensors` have the names and shapes of ClipVision's."""

    config: ClipConfig
    spec: VisionSpec
    tensors: dict[str, Tensor]


def read_tower(folder: Path) -> Tower:
    """The tower in the folder of a CLIP, a CLIPVisionModel or a LLaVA. Raises MissingInput or WeightsError."""
    check_tower(folder, None)
    spec = read_vision_spec(folder)
    config = read_config(folder)
    if config.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise WeightsError(does_not_load(folder, f"its activation {config.hidden_act!r} is none of {known}"))
    try:
        tensors = _read(folder)
    except WeightsError as error:
        why, _, _ = str(error).removeprefix(f"{folder}").lstrip("/: ").partition(" — ")
        raise WeightsError(does_not_load(folder, why)) from None
    return Tower(config, spec, _complete(folder, tensors, config))


def load_encoder(folder: Path) -> VisionEncoder:
    """The vision encoder in a folder, with its weights in fp32. Raises as `read_tower`."""
    tower = read_tower(folder)
    with NoInit():
        module = ClipVision(tower.config)
    module.load_state_dict({name: tensor.float() for name, tensor in tower.tensors.items()}, assign=True)
    return VisionEncoder(module, tower.spec)


def _read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for name, tensor in read_tensors(file, _OTHERS)[0].items():
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
            tensors[name] = tensor
    return tensors


def _complete(folder: Path, tensors: dict[str, Tensor], config: ClipConfig) -> dict[str, Tensor]:
    """The tensors of a tower. The last norm may be missing: features are taken before it."""
    shapes = tower_shapes(config)
    for part, make in (("weight", torch.ones), ("bias", torch.zeros)):
        name = f"post_layernorm.{part}"
        tensors.setdefault(name, make(shapes[name]))
    if missing := [name for name in shapes if name not in tensors]:
        raise WeightsError(
            f"{folder}: {len(missing)} tensors of the vision model are missing, the first is {missing[0]} "
            f"— {how_to_get('clip', folder)}"
        )
    if further := [name for name in tensors if name.startswith(_LAYERS) and name not in shapes]:
        why = f"{further[0]} is in it, and config.json has {config.num_hidden_layers} layers"
        raise WeightsError(does_not_load(folder, why))
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            sizes = f"{list(tensors[name].shape)}, and by config.json {list(shape)}"
            raise WeightsError(does_not_load(folder, f"{name} is {sizes}"))
        check_numbers(folder, name, tensors[name])
    return {name: tensors[name] for name in shapes}


def tower_shapes(config: ClipConfig) -> dict[str, torch.Size]:
    """The shape of each tensor. Of one layer, which all others are like: a configuration's number costs no memory."""
    with NoInit():
        tensors = ClipVision(replace(config, num_hidden_layers=1)).state_dict()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layer = {name: shapes.pop(name) for name in list(shapes) if name.startswith(_LAYERS)}
    numbers = range(config.num_hidden_layers)
    return shapes | {name.replace(".0.", f".{n}.", 1): shape for n in numbers for name, shape in layer.items()}
