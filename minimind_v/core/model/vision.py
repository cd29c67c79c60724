"""The frozen eye: transformers' CLIP vision tower, of any size. All facts about it come from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimind_v.core.errors import MissingInput, WeightsError
from minimind_v.core.hub.sources import how_to_get

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Pictures that a CPU looks at together. Of 16 at once every intermediate tensor is so large that the allocator fetches
# it anew from the system: 16 pictures in two parts give the same bits in 3.3 s instead of 3.6.
CPU_PICTURES = 8


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
    config = _read_json(folder / "config.json")
    if config is None:
        raise MissingInput(f"no vision model in {folder} (config.json is missing) — {how_to_get('clip', folder)}")
    # CLIP's own config.json nests the tower and leaves out what equals CLIPVisionConfig's defaults.
    vision = config.get("vision_config", config)
    normal = _read_json(folder / "preprocessor_config.json") or {}
    return VisionSpec(
        image_size=int(vision.get("image_size", 224)),
        patch_size=int(vision.get("patch_size", 32)),
        width=int(vision.get("hidden_size", 768)),
        mean=tuple(normal.get("image_mean", CLIP_MEAN)),
        std=tuple(normal.get("image_std", CLIP_STD)),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not JSON ({error}) — download the file again") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: not a JSON object — download the file again")
    return found


class VisionEncoder(nn.Module):
    """A CLIP vision tower that is never trained, and normalises uint8 pictures by itself."""

    def __init__(self, tower: nn.Module, spec: VisionSpec) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.spec = spec
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    @classmethod
    def load(cls, folder: Path) -> VisionEncoder:
        """Load the tower's weights from the folder of a CLIP, a CLIPVisionModel or a LLaVA; every tensor must be there.

        Raises MissingInput, or WeightsError naming what does not fit.
        """
        from transformers import CLIPVisionConfig, CLIPVisionModel
        from transformers.utils import logging

        spec = read_vision_spec(folder)
        config = _read_json(folder / "config.json") or {}
        of_llava: dict[str, Any] = {}
        if config.get("model_type") == "llava":
            of_llava = {
                "config": CLIPVisionConfig(**config.get("vision_config", {})),
                "key_mapping": {r"^(model\.)?vision_tower\.(vision_model\.)?": ""},
            }
        logging.disable_progress_bar()
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # the text half of a CLIP or a LLaVA is unexpected, and meant to be
        try:
            loaded: Any = CLIPVisionModel.from_pretrained(
                folder, output_loading_info=True, local_files_only=True, dtype=torch.float32, **of_llava
            )
        except Exception as error:  # transformers raises many kinds here, all of them about this folder
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WeightsError(
                f"{folder}: the vision model does not load ({reason}) — {how_to_get('clip', folder)}"
            ) from None
        finally:
            logging.set_verbosity(before)
        tower, info = loaded
        missing = sorted(key for key in info["missing_keys"] if "post_layernorm" not in key)
        if missing:
            raise WeightsError(
                f"{folder}: {len(missing)} tensors of the vision model are missing, the first is {missing[0]} "
                f"— {how_to_get('clip', folder)}"
            )
        return cls(tower, spec)

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in evaluation mode whatever the rest of the model does: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pictures [M, 3, H, W], uint8 or already normalised → features [M, P, width].

        Features are the last hidden state before the post-layernorm, without the CLS token.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = (pixel_values.float() / 255 - self.mean) / self.std  # [M, 3, H, W]
        pixel_values = pixel_values.to(next(self.tower.parameters()).dtype)
        together = CPU_PICTURES if pixel_values.device.type == "cpu" else len(pixel_values)
        parts = [
            self.tower(pixel_values=part).last_hidden_state[:, 1:] for part in pixel_values.split(max(together, 1))
        ]
        return torch.cat(parts)  # [M, P, width]
