"""Projectors: from the features of the vision tower to the embeddings that the language model reads.

A projector is one class and one line in PROJECTORS. `docs/extending.md` adds one from outside the package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from minimind_v.core.config.schema import LINEAR, MLP, VisionSpec
from minimind_v.core.errors import UsageError, nearest
from minimind_v.core.extensions import Table
from minimind_v.core.model.no_init import NoInit

PREFIX = "vision_proj."  # of its tensors in a checkpoint


class Projector(nn.Module, ABC):
    """Features [M, P, vision width] → embeddings [M, tokens per image, hidden size]."""

    @abstractmethod
    def __init__(self, spec: VisionSpec, hidden_size: int) -> None:
        super().__init__()

    @staticmethod
    def tokens_per_image(spec: VisionSpec) -> int:
        """The number of positions of the language model per image. Raises UsageError for a tower that does not fit."""
        return spec.tokens_per_image

    @staticmethod
    @abstractmethod
    def vision_width(tensors: Mapping[str, Tensor]) -> int | None:
        """Width of the features that a checkpoint's projector takes; None where its tensors are of another kind."""


class LinearProjector(Projector):
    """Linear(vision width → hidden size) with bias; its keys are `vision_proj.vision_proj.0.{weight,bias}`."""

    def __init__(self, spec: VisionSpec, hidden_size: int) -> None:
        super().__init__(spec, hidden_size)
        self.vision_proj = nn.Sequential(nn.Linear(spec.width, hidden_size))  # the published names want the wrapping

    def forward(self, image_features: Tensor) -> Tensor:
        """[M, P, vision width] → [M, P, hidden size]."""
        return self.vision_proj(image_features)

    @staticmethod
    def vision_width(tensors: Mapping[str, Tensor]) -> int | None:
        weight = tensors.get(f"{PREFIX}vision_proj.0.weight")
        return None if weight is None or weight.ndim != 2 else weight.shape[1]


class MlpProjector(Projector):
    """LayerNorm → Linear → GELU → Linear, that of minimind-3v; its keys are `vision_proj.mlp.{0,1,3}.{weight,bias}`."""

    def __init__(self, spec: VisionSpec, hidden_size: int) -> None:
        super().__init__(spec, hidden_size)
        inner, outer = nn.Linear(spec.width, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(nn.LayerNorm(spec.width), inner, nn.GELU(), outer)

    def forward(self, image_features: Tensor) -> Tensor:
        """[M, P, vision width] → [M, P, hidden size]."""
        return self.mlp(image_features)

    @staticmethod
    def vision_width(tensors: Mapping[str, Tensor]) -> int | None:
        norm = tensors.get(f"{PREFIX}mlp.0.weight")
        return None if norm is None or norm.ndim != 1 else len(norm)  # in April 2026 it was a Linear


PROJECTORS: Table[type[Projector]] = Table({LINEAR: LinearProjector, MLP: MlpProjector})


def find_projector(name: str) -> type[Projector]:
    """The projector of this name. Raises UsageError where there is none."""
    if name not in PROJECTORS:
        raise UsageError(
            f"projector {name!r} must be one of {', '.join(PROJECTORS)}{nearest(name, PROJECTORS)} — "
            f"for one of your own, name its file in MMV_EXTENSIONS"
        )
    return PROJECTORS[name]


def recognise_projector(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the projector that a checkpoint's tensors are of; None for a text-only base, or for no known one."""
    return next((name for name, kind in PROJECTORS.items() if kind.vision_width(tensors) is not None), None)


def projected(spec: VisionSpec, projector: str) -> VisionSpec:
    """The vision spec as prompts and the language model have it: with the tokens per image that leave the projector."""
    return replace(spec, tokens_per_image=find_projector(projector).tokens_per_image(spec))


def projector_shapes(spec: VisionSpec, hidden_size: int, projector: str = LINEAR) -> dict[str, torch.Size]:
    """The names and shapes of a projector's tensors in a checkpoint. No memory is taken."""
    with NoInit(), torch.device("meta"):
        tensors = find_projector(projector)(spec, hidden_size).state_dict()
    return {PREFIX + name: tensor.shape for name, tensor in tensors.items()}
