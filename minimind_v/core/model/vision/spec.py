"""Vision towers by transformers' `model_type`, and the configurations in their folders, read without loading them.

A tower is one entry of TOWERS. `docs/extending.md` adds one from outside the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind_v.core.config.generation import V2026
from minimind_v.core.config.schema import (
    CLIP_MEAN,
    CLIP_STD,
    CLIP_VISION,
    MOST_PARAMETERS,
    SIGLIP_COLOURS,
    SIGLIP_VISION,
    VisionSpec,
)
from minimind_v.core.errors import MissingInput, UsageError, WeightsError, nearest
from minimind_v.core.extensions import Table
from minimind_v.core.files import read_json
from minimind_v.core.hub.sources import how_to_get
from minimind_v.core.model.vision.clip_config import ClipConfig
from minimind_v.core.model.vision.preprocessing import FILE, read_preprocessing, trouble_of_preprocessing
from minimind_v.core.model.vision.siglip_config import Siglip2Config, SiglipConfig
from minimind_v.core.paths import STANDARD_PRESET

if TYPE_CHECKING:
    from torch import nn

# The largest sizes of a tower, far above those of any known one: more is refused before memory is taken.
MOST_SIZES = {"hidden_size": 4_096, "intermediate_size": 16_384, "num_hidden_layers": 256, "num_attention_heads": 256,
              "num_channels": 3, "image_size": 4_096, "patch_size": 128, "layer_norm_eps": 1.0}  # fmt: skip
MOST_PATCHES = 16_384
STANDARD = {  # the towers of the published models: ViT-B/16, and ViT-B/32 at 256 pixels
    CLIP_VISION: ClipConfig(patch_size=16),
    SIGLIP_VISION: SiglipConfig(image_size=256, patch_size=32),
}
_DEMO: dict[str, Any] = {"image_size": 64, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512,
         "num_hidden_layers": 4, "num_attention_heads": 4}  # fmt: skip
DEMO = {CLIP_VISION: ClipConfig(**_DEMO), SIGLIP_VISION: SiglipConfig(**_DEMO)}  # the towers of the demo


def _strip_prefixes(name: str) -> str:
    for prefix in ("model.", "vision_tower.", "vision_model."):
        name = name.removeprefix(prefix)
    return name


@dataclass(frozen=True)
class TowerType:
    """One kind of vision tower.

    config: a dataclass of the keys of `config.json` that decide what the tower computes, with their default values.
    build: a config → a module with random weights. It encodes normalised images [M, 3, S, S] as features [M, P, width].
    describe: a config and the settings of the image processor → the spec of the tower. Raises UsageError.
    trouble: why no tower can have such a config; None if one can. It takes no memory for the sizes in the file.
    rename: the name of a tensor in the file → its name in the module.
    unused: beginnings of names of tensors on which the features do not depend, and which a file may lack.
    """

    config: type[Any]
    build: Callable[[Any], nn.Module]
    describe: Callable[[Any, dict[str, Any]], VisionSpec]
    trouble: Callable[[Any], str | None] = lambda config: None
    rename: Callable[[str], str] = _strip_prefixes
    unused: tuple[str, ...] = ()


def tower_type(model_type: str) -> TowerType:
    """The entry of a `model_type`. Raises UsageError where there is none."""
    if model_type not in TOWERS:
        raise UsageError(
            f"vision tower {model_type!r} must be one of {', '.join(TOWERS)}{nearest(model_type, TOWERS)} — "
            f"for one of your own, name its file in MMV_EXTENSIONS"
        )
    return TOWERS[model_type]


def read_tower_config(
    folder: Path, standard: str | None = None, preset: str = STANDARD_PRESET
) -> tuple[TowerType, Any]:
    """The kind of a folder's tower, and its config from `config.json`: that of a tower, or of a whole CLIP, SigLIP or
    LLaVA.

    Raises MissingInput where the folder or the file is absent, with the download of `preset`, unless `standard` names a
    type of STANDARD; WeightsError where no tower can be so.
    """
    values = read_json(folder / "config.json")
    if values is None:
        if standard:
            return TOWERS[standard], STANDARD[standard]
        get = how_to_get("clip", folder, preset)
        raise MissingInput(f"no vision model in {folder} (config.json is missing) — {get}")
    whole = str(values.get("model_type", CLIP_VISION))
    values = values.get("vision_config", values)  # a whole CLIP nests its tower
    if not isinstance(values, dict):
        raise WeightsError(does_not_load(folder, "vision_config is not an object", whole))
    model_type = str(values.get("model_type", whole if whole in TOWERS else CLIP_VISION))
    try:
        kind = tower_type(model_type)
    except UsageError as error:
        raise WeightsError(f"{folder}: {error}") from None
    config = kind.config(**{item.name: values.get(item.name, item.default) for item in fields(kind.config)})
    if trouble := kind.trouble(config):
        raise WeightsError(does_not_load(folder, f"in config.json {trouble}", model_type))
    return kind, config


def read_vision_spec(folder: Path, standard: str | None = None, preset: str = STANDARD_PRESET) -> VisionSpec:
    """The spec of a folder's tower. Without the settings of an image processor it has the defaults of its class in
    transformers. Raises as `read_tower_config`.
    """
    kind, config = read_tower_config(folder, standard, preset)
    settings = read_preprocessing(folder) or {}
    mean, std = (settings.get(key, default) for key, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)))
    trouble = trouble_of_colours(mean, std) or _trouble_of_size(settings)
    try:
        if trouble:
            raise UsageError(trouble)
        return kind.describe(config, settings)
    except UsageError as error:
        model_type = next(name for name, other in TOWERS.items() if other is kind)
        raise WeightsError(does_not_load(folder, f"in {FILE} {error}", model_type)) from None


# --- CLIP -------------------------------------------------------------------------------------------------------------


def _build_clip(config: ClipConfig) -> nn.Module:
    from minimind_v.core.model.vision.clip import ClipVision  # not above: a folder is checked before torch is imported

    return ClipVision(config)


def _describe_clip(config: ClipConfig, preprocessing: dict[str, Any]) -> VisionSpec:
    mean, std = preprocessing.get("image_mean", CLIP_MEAN), preprocessing.get("image_std", CLIP_STD)
    spec = VisionSpec(config.image_size, config.patch_size, config.hidden_size, tuple(mean), tuple(std))
    return _checked(spec, preprocessing)


def _checked(spec: VisionSpec, preprocessing: dict[str, Any]) -> VisionSpec:
    if trouble := trouble_of_preprocessing(preprocessing, spec):
        raise UsageError(trouble)
    return spec


def trouble_of(config: ClipConfig) -> str | None:
    """Why no tower can be of these sizes; None where one can."""
    for item in fields(ClipConfig):
        name, value = item.name, getattr(config, item.name)
        kind, most = type(item.default), MOST_SIZES.get(name, 0)
        if not (isinstance(value, str) if kind is str else type(value) in (int, kind) and value > 0):
            return f"{name} is {value!r}"
        if kind is not str and not value <= most:
            return f"{name} is {value}; the maximum is {most:,}"
    width, heads, patch, image = config.hidden_size, config.num_attention_heads, config.patch_size, config.image_size
    if width % heads:
        return f"a width of {width} does not divide into {heads} heads"
    if config.num_channels != ClipConfig.num_channels:
        return f"num_channels is {config.num_channels}, images have {ClipConfig.num_channels}"
    patches = (image // patch) ** 2
    if not 0 < patches <= MOST_PATCHES:
        return f"an image_size of {image} has {patches:,} patches of patch_size {patch}, not 1 to {MOST_PATCHES:,}"
    layers = config.num_hidden_layers * (4 * width + 2 * config.intermediate_size) * width
    count = layers + (config.num_channels * patch**2 + patches) * width
    if count > MOST_PARAMETERS:
        return f"hidden_size {width} makes {count:,} parameters; the maximum is {MOST_PARAMETERS:,}"
    return None


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


def does_not_load(folder: Path, why: str, model_type: str) -> str:
    """An error about a folder with a tower of this type, with the next step."""
    get = how_to_get("clip", folder, V2026.preset if model_type in V2026.towers else STANDARD_PRESET)
    return f"{folder}: the vision model could not be loaded ({why}) — {get}"


# --- SigLIP -----------------------------------------------------------------------------------------------------------

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # of Pillow, by their numbers


def _build_siglip(config: SiglipConfig) -> nn.Module:
    from minimind_v.core.model.vision.siglip import SiglipVision

    return SiglipVision(config)


def _describe_siglip(config: SiglipConfig, preprocessing: dict[str, Any]) -> VisionSpec:
    mean, std = (preprocessing.get(key, SIGLIP_COLOURS) for key in ("image_mean", "image_std"))
    number = preprocessing.get("resample", FILTERS.index("bicubic"))
    if type(number) is not int or not 0 <= number < len(FILTERS):
        raise UsageError(f"resample is {number!r}, not the number of a filter of Pillow, 0 to {len(FILTERS) - 1}")
    spec = VisionSpec(
        config.image_size, config.patch_size, config.hidden_size, tuple(mean), tuple(std),
        resize_mode="squeeze", resample=FILTERS[number], model_type=SIGLIP_VISION,
    )  # fmt: skip
    return _checked(spec, preprocessing)


def _trouble_of_siglip2(config: Siglip2Config) -> str | None:
    if config.image_size:
        if trouble := trouble_of(config):
            return trouble
        if config.num_patches == (config.image_size // config.patch_size) ** 2:
            return None
    return (
        f"it is a SigLIP2 NaFlex, of {config.num_patches} patches in any aspect: {V2026.name} had it in April 2026; "
        "mmv supports today's form, a SigLIP for images of one size"
    )


_CLIP = TowerType(ClipConfig, _build_clip, _describe_clip, trouble_of, unused=("post_layernorm.",))
_SIGLIP = TowerType(SiglipConfig, _build_siglip, _describe_siglip, trouble_of)
# SigLIP2 for images of one size computes the same; its config.json has the size where mmv wrote it.
_SIGLIP2 = TowerType(Siglip2Config, _build_siglip, _describe_siglip, _trouble_of_siglip2)
TOWERS: Table[TowerType] = Table({
    CLIP_VISION: _CLIP,
    "clip": _CLIP,
    SIGLIP_VISION: _SIGLIP,
    "siglip": _SIGLIP,
    "siglip2_vision_model": _SIGLIP2,
    "siglip2": _SIGLIP2,
})  # fmt: skip
