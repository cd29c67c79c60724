"""The frozen eye: transformers' CLIP vision tower, of any size. All facts about it come from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.errors import WeightsError
from minimind_v.core.hub.sources import how_to_get
from minimind_v.core.model.vision_spec import CLIP_MEAN, CLIP_STD, VisionSpec, read_json, read_vision_spec

__all__ = ["CLIP_MEAN", "CLIP_STD", "VisionEncoder", "VisionSpec", "read_vision_spec"]

# Pictures that a CPU looks at together. Of 16 at once every intermediate tensor is so large that the allocator fetches
# it anew from the system; parts of 4 and of 8 give the same bits in 0.29 and 0.31 CPU seconds a picture.
CPU_PICTURES = 4
QUICK = 1.702  # of CLIP's activation, x · sigmoid(QUICK · x)


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
        config = read_json(folder / "config.json") or {}
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
        parts = [self._look(part)[:, 1:] for part in pixel_values.split(max(together, 1))]
        return torch.cat(parts)  # [M, P, width]

    def _look(self, pictures: Tensor) -> Tensor:
        tower: Any = self.tower
        exact = pictures.dtype == torch.float32 and not torch.is_autocast_enabled(pictures.device.type)
        if pictures.device.type == "cpu" and exact and tower.config.hidden_act == "quick_gelu":
            return _walk(tower, pictures)
        return tower(pixel_values=pictures).last_hidden_state


def _walk(tower: Any, pictures: Tensor) -> Tensor:
    """What CLIPVisionModel does, [M, 3, H, W] → [M, 1 + P, width], without its tensors between the products.

    Its activation, x · sigmoid(1.702 x), is silu(1.702 x) / 1.702: the products before and after it scale. What is
    added is added in place. Some eighth of the time of a picture on a CPU.
    """
    x = tower.pre_layrnorm(tower.embeddings(pictures))  # [M, T, width]
    heads = tower.config.num_attention_heads
    flat = x.flatten(0, 1)  # [M·T, width]
    for layer in tower.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = layer.layer_norm1(x)
        q, k, v = (
            proj(normed).unflatten(-1, (heads, -1)).transpose(1, 2)  # [M, heads, T, hd]
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(flat.shape)
        flat.add_(attention.out_proj.bias).addmm_(out, attention.out_proj.weight.t())
        normed = layer.layer_norm2(flat)
        act = torch.addmm(mlp.fc1.bias, normed, mlp.fc1.weight.t(), beta=QUICK, alpha=QUICK)
        flat.add_(mlp.fc2.bias).addmm_(F.silu(act, inplace=True), mlp.fc2.weight.t(), alpha=1 / QUICK)
    return x
