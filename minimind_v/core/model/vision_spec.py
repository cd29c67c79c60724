"""What a vision tower is, read from its folder without loading it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from minimind_v.core.errors import MissingInput, WeightsError
from minimind_v.core.files import read_json
from minimind_v.core.hub.sources import how_to_get

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipConfig:
    """What decides what a tower computes, by transformers' names, with the values that its files leave out."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


STANDARD = ClipConfig(patch_size=16)  # ViT-B/16, which the published models look with


@dataclass(frozen=True)
class VisionSpec:
    """What the rest of the system must know of a vision tower."""

    image_size: int
    patch_size: int
    width: int  # of one feature vector
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @property
    def tokens_per_image(self) -> int:
        """Patches per picture: each becomes one position of the language model (196 for ViT-B/16)."""
        return (self.image_size // self.patch_size) ** 2


def read_config(folder: Path, standard: bool = False) -> ClipConfig:
    """Read `config.json`, that of a CLIP, a CLIPVisionModel or a LLaVA.

    Raises MissingInput where the folder or the file is absent, unless the `standard` sizes do then; WeightsError where
    no tower can be so.
    """
    told = read_json(folder / "config.json")
    if told is None:
        if standard:
            return STANDARD
        raise MissingInput(f"no vision model in {folder} (config.json is missing) — {how_to_get('clip', folder)}")
    # CLIP's own nests the tower.
    told = told.get("vision_config", told)
    if not isinstance(told, dict):
        raise WeightsError(does_not_load(folder, "vision_config of config.json is no object"))
    config = ClipConfig(**{field.name: told.get(field.name, field.default) for field in fields(ClipConfig)})
    for name, value in vars(config).items():
        kind = type(getattr(ClipConfig, name))
        if not (isinstance(value, str) if kind is str else type(value) in (int, kind) and value > 0):
            raise WeightsError(does_not_load(folder, f"{name} of config.json is {value!r}"))
    if config.hidden_size % config.num_attention_heads:
        heads = config.num_attention_heads
        raise WeightsError(does_not_load(folder, f"{heads} heads cannot share a width of {config.hidden_size}"))
    return config


def read_vision_spec(folder: Path, standard: bool = False) -> VisionSpec:
    """As `read_config`, with what `preprocessor_config.json` tells, if it is present."""
    config = read_config(folder, standard)
    normal = read_json(folder / "preprocessor_config.json") or {}
    return VisionSpec(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        mean=tuple(normal.get("image_mean", CLIP_MEAN)),
        std=tuple(normal.get("image_std", CLIP_STD)),
    )


def does_not_load(folder: Path, why: str) -> str:
    """What is wrong with a folder, and the next step."""
    return f"{folder}: the vision model does not load ({why}) — {how_to_get('clip', folder)}"
