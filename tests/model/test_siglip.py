"""The features of a SigLIP tower are those of transformers' SiglipVisionModel, from the same folder."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from minimind_v.core.config.schema import SIGLIP_COLOURS, VisionSpec
from minimind_v.core.errors import WeightsError
from minimind_v.core.formats.vision_tower import load_encoder
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.kernels.cpu_clip import CpuSiglipVision
from minimind_v.core.model.vision.clip import ACTIVATIONS
from minimind_v.core.model.vision.spec import FILTERS, read_vision_spec
from tests.model.conftest import KINDS, TOWER_SIZES, encoder_of, spread

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["tower alone", "whole SigLIP"])
def folder(request, tmp_path_factory):
    """A SigLIP tower saved alone, with its pooling head, or inside a whole SigLIP as the hub has it."""
    path = tmp_path_factory.mktemp("siglip")
    if request.param == "tower alone":
        model = SiglipVisionModel(SiglipVisionConfig(**TOWER_SIZES))
    else:
        text = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = SiglipModel(SiglipConfig(text_config=text | {"vocab_size": 20}, vision_config=TOWER_SIZES))
    spread(model, 0)
    model.save_pretrained(path)
    return path


@KINDS
@torch.no_grad()
def test_features_are_those_of_siglip(folder, fast):
    encoder, model = encoder_of(folder, fast), SiglipVisionModel.from_pretrained(folder).eval()
    pixels = torch.randn(3, 3, 48, 48)
    features, expected = encoder(pixels), model(pixel_values=pixels).last_hidden_state
    assert features.shape == (3, encoder.spec.tokens_per_image, encoder.spec.width) == (3, 9, 32)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert (features[0] - features[1]).abs().max() > 0.1, "images make no difference"


@KINDS
@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", *sorted(set(ACTIVATIONS) - {"gelu_pytorch_tanh"})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_towers_of_every_activation(activation, dtype, fast, tmp_path):
    model = SiglipVisionModel(SiglipVisionConfig(**TOWER_SIZES, hidden_act=activation)).eval()
    spread(model, 1)
    model.save_pretrained(tmp_path)
    encoder, pixels = encoder_of(tmp_path, fast).to(dtype), torch.randn(2, 3, 48, 48)
    exact = model.double()(pixel_values=pixels.double()).last_hidden_state
    theirs = model.to(dtype)(pixel_values=pixels.to(dtype)).last_hidden_state
    ours_off, theirs_off = ((values.double() - exact).square().mean().sqrt() for values in (encoder(pixels), theirs))
    assert ours_off < 1.5 * theirs_off, "another function, not other rounding"


@torch.no_grad()
def test_packed_weights_are_made_again_after_a_change(folder):
    encoder, other = (accelerate(load_encoder(folder), CPU) for _ in range(2))
    assert type(encoder.tower) is CpuSiglipVision
    pixels = torch.randn(2, 3, 48, 48)
    before = encoder(pixels)
    for tower in (encoder.tower, other.tower):
        tower.encoder.layers[1].mlp.fc1.weight.mul_(1.5)
    assert torch.equal(encoder(pixels), other(pixels))
    assert not torch.equal(encoder(pixels), before)


def test_images_are_prepared_as_the_folder_says(tmp_path):
    SiglipVisionConfig(**TOWER_SIZES).save_pretrained(tmp_path)
    usual = VisionSpec(48, 16, 32, SIGLIP_COLOURS, SIGLIP_COLOURS, 9, "squeeze", "bicubic", "siglip_vision_model")
    assert read_vision_spec(tmp_path) == usual
    for number, name in enumerate(FILTERS):
        described = {"image_mean": [0.4] * 3, "image_std": [0.6] * 3, "resample": number}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
        spec = read_vision_spec(tmp_path)
        assert (spec.mean, spec.std, spec.resample) == ((0.4,) * 3, (0.6,) * 3, name)
    for wrong in (6, -1, "bicubic", True):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"resample": wrong}))
        with pytest.raises(WeightsError, match=r"resample is .* not the number of a filter of Pillow"):
            read_vision_spec(tmp_path)


def test_filters_are_numbered_as_pillow_numbers_them():
    from PIL import Image

    assert [getattr(Image.Resampling, name.upper()) for name in FILTERS] == list(range(len(FILTERS)))
