"""The sizes of a SigLIP vision tower, by transformers' names. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from minimind_v.core.model.vision.clip_config import ClipConfig


@dataclass(frozen=True)
class SiglipConfig(ClipConfig):
    """The settings of a tower: those of CLIP, with the default values of SigLIP's files."""

    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class Siglip2Config(SiglipConfig):
    """The settings of a SigLIP2 tower. `image_size` is 0 where it encodes images of any size (NaFlex)."""

    image_size: int = 0
    num_patches: int = 256
