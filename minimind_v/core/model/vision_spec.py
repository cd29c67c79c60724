"""What the rest of the system must know of a vision tower, read from its folder without loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_v.core.errors import MissingInput, WeightsError
from minimind_v.core.hub.sources import how_to_get

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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


def read_vision_spec(folder: Path) -> VisionSpec:
    """Read `config.json` (a CLIP or a CLIP vision configuration) and, if present, `preprocessor_config.json`.

    Raises MissingInput where the folder or its configuration is absent.
    """
    config = read_json(folder / "config.json")
    if config is None:
        raise MissingInput(f"no vision model in {folder} (config.json is missing) — {how_to_get('clip', folder)}")
    # CLIP's own config.json nests the tower and leaves out what equals CLIPVisionConfig's defaults.
    vision = config.get("vision_config", config)
    normal = read_json(folder / "preprocessor_config.json") or {}
    return VisionSpec(
        image_size=int(vision.get("image_size", 224)),
        patch_size=int(vision.get("patch_size", 32)),
        width=int(vision.get("hidden_size", 768)),
        mean=tuple(normal.get("image_mean", CLIP_MEAN)),
        std=tuple(normal.get("image_std", CLIP_STD)),
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no file. Raises WeightsError for anything else."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not JSON ({error}) — download the file again") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: not a JSON object — download the file again")
    return found
