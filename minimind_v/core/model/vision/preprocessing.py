"""The settings by which a folder's image processor prepares images, and which of them mmv computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minimind_v.core.config.schema import VisionSpec
from minimind_v.core.files import object_in, read_json

FILE = "preprocessor_config.json"
# LFM2-VL's processor makes every image one tile of the tower's size by these settings: it is squeezed.
ONE_TILE = {"do_image_splitting": True, "min_tiles": 0, "max_tiles": 1, "max_pixels_tolerance": 0.0,
            "use_thumbnail": False, "downsample_factor": 1}  # fmt: skip
_ALWAYS = {"do_resize": True, "do_rescale": True, "do_normalize": True}
_BICUBIC = 3  # Pillow's number


def read_preprocessing(folder: Path) -> dict[str, Any] | None:
    """The settings of a folder's image processor; None where the folder has none, so that its class' defaults hold.

    They are in a file of their own; transformers 5 saves them in that of a whole processor. Raises WeightsError.
    """
    return object_in(read_json(folder / "processor_config.json") or {}, "image_processor") or read_json(folder / FILE)


def trouble_of_preprocessing(settings: dict[str, Any], spec: VisionSpec) -> str | None:
    """Why images cannot be prepared as these settings say; None where they can. A missing key has its usual value."""
    size, patch = spec.image_size, spec.patch_size
    expected: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in _ALWAYS.items()}
    square = {"height": size, "width": size}
    if "tile_size" in settings:
        expected |= {key: (value,) for key, value in ONE_TILE.items()}
        expected |= {"tile_size": (size,), "encoder_patch_size": (patch,)}
    elif spec.resize_mode == "squeeze":
        expected |= {"size": (square, size), "do_center_crop": (False, None), "max_num_patches": ()}
    else:
        expected |= {"size": ({"shortest_edge": size}, size), "do_center_crop": (True,),
                     "crop_size": (square, size), "resample": (_BICUBIC,)}  # fmt: skip
    for key, values in expected.items():
        setting = settings.get(key)
        if isinstance(setting, dict):
            setting = {side: length for side, length in setting.items() if length is not None}
        if setting is not None and setting not in values:
            needed = f"this vision model needs {values[0]!r}" if values else "images of any aspect are not supported"
            return f"{key} is {setting!r}, but {needed}"
    factor = settings.get("rescale_factor", 1 / 255)
    if type(factor) not in (int, float) or abs(factor * 255 - 1) > 1e-6:
        return f"rescale_factor is {factor!r}, but this vision model needs 1/255"
    return None
