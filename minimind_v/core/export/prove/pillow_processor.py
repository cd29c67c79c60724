"""LFM2-VL's inputs by Pillow and the folder's own settings, where torchvision cannot be imported. Without mmv."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature

IMAGE_PROCESSOR = "Lfm2VlImageProcessor"  # transformers has it with torchvision only


class PillowProcessor:
    """A folder's tokenizer and chat template, and images as `preprocessor_config.json` says: one squeezed tile each."""

    def __init__(self, folder: str) -> None:
        self.settings = _read(folder, "preprocessor_config.json")
        self.image_tokens = _read(folder, "processor_config.json")["num_image_tokens"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @staticmethod
    def replaces_the_own(folder: str) -> bool:
        """Whether transformers cannot open the folder's own processor here."""
        own = _read(folder, "preprocessor_config.json").get("image_processor_type")
        return own == IMAGE_PROCESSOR and not has_torchvision()

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **_: Any
    ) -> BatchFeature:
        """The inputs of the model for a prompt: ids, and patches [M, P, p · p · 3] of its images."""
        text = str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )
        token = self.tokenizer.image_token
        inputs = dict(self.tokenizer(text.replace(token, token * self.image_tokens), return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        images = [item["image"] for message in messages for item in message["content"] if item["type"] == "image"]
        if images:
            side = self.settings["tile_size"] // self.settings["encoder_patch_size"]
            inputs["pixel_values"] = torch.stack([self._patches(image) for image in images])
            inputs["spatial_shapes"] = torch.tensor([[side, side]] * len(images))
            inputs["pixel_attention_mask"] = torch.ones(len(images), side * side, dtype=torch.int32)
        return BatchFeature(inputs)

    def _patches(self, image: Image.Image) -> Tensor:
        """[P, p · p · 3]"""
        size, patch = self.settings["tile_size"], self.settings["encoder_patch_size"]
        squeezed = image.convert("RGB").resize((size, size), Image.Resampling(self.settings["resample"]))
        mean, std = (torch.tensor(self.settings[name]) for name in ("image_mean", "image_std"))
        pixels = (torch.from_numpy(np.array(squeezed)).float() / 255 - mean) / std  # [S, S, 3]
        tiles = pixels.unflatten(0, (-1, patch)).unflatten(2, (-1, patch))  # [S / p, p, S / p, p, 3]
        return tiles.transpose(1, 2).flatten(2).flatten(0, 1)


def has_torchvision() -> bool:
    """Whether torchvision can be imported; one that was built for another torch cannot."""
    try:
        import torchvision  # noqa: F401
    except Exception:  # a build for another torch raises RuntimeError
        return False
    return True


def _read(folder: str, name: str) -> dict[str, Any]:
    path = Path(folder, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
