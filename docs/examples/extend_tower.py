"""A vision tower in one file: the mean colours of patches, and one more feature for the whole image. A toy.

python extend_tower.py patches        # writes the folder `patches` with random weights
MMV_EXTENSIONS=extend_tower.py mmv train pretrain --vision-model patches …
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from minimind_v.core.config.schema import VisionSpec
from minimind_v.core.model.vision.spec import TOWERS, TowerType

MODEL_TYPE = "patch_means"  # in the folder's config.json


@dataclass(frozen=True)
class Config:
    """The keys of config.json that decide what the tower computes, with the values for absent keys."""

    image_size: int = 48
    patch_size: int = 16
    hidden_size: int = 32


class PatchMeans(nn.Module):
    """Normalised images [M, 3, S, S] → features [M, P + 1, width]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.half = config.patch_size // 2
        self.linear = nn.Linear(12, config.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        means = F.avg_pool2d(images, self.half)  # [M, 3, 2·side, 2·side]
        patches = F.unfold(means, kernel_size=2, stride=2).mT  # [M, P, 12]
        whole = patches.mean(dim=1, keepdim=True)  # [M, 1, 12]
        return self.linear(torch.cat((patches, whole), dim=1))  # [M, P + 1, width]


def describe(config: Config, preprocessing: dict) -> VisionSpec:
    """What the rest of the system must know: ten features for an image that is squeezed to 48 × 48 pixels."""
    return VisionSpec(
        config.image_size,
        config.patch_size,
        width=config.hidden_size,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        tokens_per_image=(config.image_size // config.patch_size) ** 2 + 1,
        resize_mode="squeeze",
        model_type=MODEL_TYPE,
    )


def trouble(config: Config) -> str | None:
    """Why no tower can have this config, from whoever the folder comes; None where one can."""
    fits = all(type(value) is int and 2 <= value <= 1024 for value in asdict(config).values())
    return None if fits and config.image_size % config.patch_size == 0 else f"sizes do not fit: {asdict(config)}"


TOWERS[MODEL_TYPE] = TowerType(Config, build=PatchMeans, describe=describe, trouble=trouble)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir()
    torch.manual_seed(0)
    save_file(PatchMeans(Config()).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPE} | asdict(Config())))
