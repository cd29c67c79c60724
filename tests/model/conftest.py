"""Tiny models for the tests of this folder. All are drawn from a seed and in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from minimind_v.core.config.schema import LINEAR, TextConfig
from minimind_v.core.formats.vision_tower import load_encoder
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.vision.clip import ClipVision
from minimind_v.core.model.vision.encoder import VisionEncoder, VisionSpec
from minimind_v.core.model.vision.spec import ClipConfig
from minimind_v.core.model.vlm import VLM

KINDS = pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
TOWER_SIZES = {
    "image_size": 48,
    "patch_size": 16,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
PLACEHOLDER_ID = 5
SPEC = VisionSpec(image_size=16, patch_size=8, width=24)  # 4 tokens per image
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
}

# Language models of minimind-3v: normed heads, and experts of which each token has one.
NORMED = {"qk_norm": True}
NORMED_EXPERTS = {
    "qk_norm": True,
    "use_moe": True,
    "num_experts_per_tok": 1,
    "n_shared_experts": 0,
    "aux_loss_scope": "batch",
}


def encoder_of(folder: Path, fast: bool) -> VisionEncoder:
    """The vision encoder in a folder, plain or accelerated."""
    encoder = load_encoder(folder)
    return accelerate(encoder, torch.device("cpu")) if fast else encoder


def spread(module: nn.Module, seed: int) -> None:
    """Draw all weights anew and wide: of a fresh model all answers, and so all differences, are nearly zero."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim < 2:
            nn.init.normal_(parameter, 1.0, 0.2)
        else:
            nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)


def tiny_vlm(seed: int = 0, with_tower: bool = False, projector: str = LINEAR, **sizes: object) -> VLM:
    """A VLM in evaluation mode with wide random weights; keywords change SIZES. `with_tower`: with a vision tower."""
    model = VLM(TextConfig(**(SIZES | sizes)), SPEC, PLACEHOLDER_ID, projector=projector)
    spread(model, seed)
    if with_tower:
        model.vision_encoder = tiny_encoder(seed)
    return model.eval()


@pytest.fixture(params=["plain", "accelerated"])
def make_vlm(request):
    """Builds `tiny_vlm`, as it is and with the fast parts of a CPU."""

    def make(*args: object, **sizes: object) -> VLM:
        model = tiny_vlm(*args, **sizes)
        return accelerate(model, torch.device("cpu")) if request.param == "accelerated" else model

    return make


def tiny_encoder(seed: int) -> VisionEncoder:
    """A vision encoder with the random weights that transformers draws."""
    from transformers import CLIPVisionConfig, CLIPVisionModel  # seconds, for each process of a test that needs none

    torch.manual_seed(seed)
    sizes = {
        "image_size": SPEC.image_size,
        "patch_size": SPEC.patch_size,
        "hidden_size": SPEC.width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    drawn = CLIPVisionModel(CLIPVisionConfig(**sizes, initializer_factor=20.0))  # else images hardly differ
    tower = ClipVision(ClipConfig(**sizes))
    tower.load_state_dict(drawn.state_dict())
    return VisionEncoder(tower, SPEC)
