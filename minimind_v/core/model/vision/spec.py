"""What a vision tower is, read from its folder without loading it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from minimind_v.core.config.schema import MOST_PARAMETERS
from minimind_v.core.errors import MissingInput, WeightsError
from minimind_v.core.files import read_json
from minimind_v.core.hub.sources import how_to_get

# The largest sizes of a tower, some times those of the largest that there are: more is refused before memory is taken.
MOST_SIZES = {"hidden_size": 4_096, "intermediate_size": 16_384, "num_hidden_layers": 256, "num_attention_heads": 256,
              "num_channels": 3, "image_size": 4_096, "patch_size": 128, "layer_norm_eps": 1.0}  # fmt: skip
MOST_PATCHES = 16_384
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
        raise WeightsError(does_not_load(folder, "vision_config is no object"))
    config = ClipConfig(**{field.name: told.get(field.name, field.default) for field in fields(ClipConfig)})
    if trouble := trouble_of(config):
        raise WeightsError(does_not_load(folder, f"in config.json {trouble}"))
    return config


def trouble_of(config: ClipConfig) -> str | None:
    """Why no tower can be of these sizes; None where one can."""
    for name, value in vars(config).items():
        kind, most = type(getattr(ClipConfig, name)), MOST_SIZES.get(name, 0)
        if not (isinstance(value, str) if kind is str else type(value) in (int, kind) and value > 0):
            return f"{name} is {value!r}"
        if kind is not str and not value <= most:
            return f"{name} is {value}, the most is {most:,}"
    width, heads, patch, image = config.hidden_size, config.num_attention_heads, config.patch_size, config.image_size
    if width % heads:
        return f"{heads} heads cannot share a width of {width}"
    if config.num_channels != ClipConfig.num_channels:
        return f"num_channels is {config.num_channels}, images have {ClipConfig.num_channels}"
    patches = (image // patch) ** 2
    if not 0 < patches <= MOST_PATCHES:
        return f"an image_size of {image} has {patches:,} patches of patch_size {patch}, not 1 to {MOST_PATCHES:,}"
    layers = config.num_hidden_layers * (4 * width + 2 * config.intermediate_size) * width
    count = layers + (config.num_channels * patch**2 + patches) * width
    if count > MOST_PARAMETERS:
        return f"hidden_size {width} makes {count:,} parameters, the most is {MOST_PARAMETERS:,}"
    return None


def read_vision_spec(folder: Path, standard: bool = False) -> VisionSpec:
    """As `read_config`, with what `preprocessor_config.json` tells, if it is present."""
    config = read_config(folder, standard)
    normal = read_json(folder / "preprocessor_config.json") or {}
    mean, std = normal.get("image_mean", CLIP_MEAN), normal.get("image_std", CLIP_STD)
    if trouble := trouble_of_colours(mean, std) or _trouble_of_size(normal):
        raise WeightsError(does_not_load(folder, f"in preprocessor_config.json {trouble}"))
    return VisionSpec(config.image_size, config.patch_size, config.hidden_size, tuple(mean), tuple(std))


def trouble_of_colours(mean: Any, std: Any) -> str | None:
    """Why these cannot be the mean and the deviation of pixels from 0 to 1, one of each colour; None where they can."""
    for key, values, least, most in (("image_mean", mean, 0.0, 1.0), ("image_std", std, 0.001, 10.0)):
        numbers = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
        if not numbers or len(values) != ClipConfig.num_channels or not all(least <= value <= most for value in values):
            return f"{key} is {values!r}, not three numbers from {least:g} to {most:g}"
    return None


def _trouble_of_size(normal: dict[str, Any]) -> str | None:
    most = int(MOST_SIZES["image_size"])
    for key in ("size", "crop_size"):
        sizes = normal.get(key)
        values = list(sizes.values()) if isinstance(sizes, dict) else sizes if isinstance(sizes, list) else [sizes]
        for value in values:
            if value is not None and not (type(value) is int and 0 < value <= most):
                return f"{key} is {sizes!r}, not sizes from 1 to {most:,}"
    return None


def does_not_load(folder: Path, why: str) -> str:
    """What is wrong with a folder, and the next step."""
    return f"{folder}: the vision model does not load ({why}) — {how_to_get('clip', folder)}"
