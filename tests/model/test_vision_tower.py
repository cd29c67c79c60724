"""What the eye sees is what transformers' CLIP sees, from the file of a picture to its features."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from minimind_v.core.data.images import load_pixels, to_pixels
from minimind_v.core.errors import MissingInput, WeightsError
from minimind_v.core.formats.vision_tower import load_encoder
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.vision.clip import ACTIVATIONS
from minimind_v.core.model.vision.encoder import CLIP_MEAN, CLIP_STD, VisionEncoder, VisionSpec, read_vision_spec
from tests.model.conftest import KINDS, TOWER_SIZES, encoder_of, spread

CPU = torch.device("cpu")
VISION = TOWER_SIZES | {"initializer_factor": 5.0}


@pytest.fixture(scope="module", params=["tower alone", "whole CLIP"])
def folder(request, tmp_path_factory):
    """A CLIP vision model saved alone, or inside a whole CLIP as the hub has it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    if request.param == "tower alone":
        model = CLIPVisionModel(CLIPVisionConfig(**VISION))
    else:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = CLIPModel(CLIPConfig(text_config=text | {"vocab_size": 20}, vision_config=VISION, projection_dim=8))
    for name, parameter in model.named_parameters():
        if "post_layernorm" in name:  # a fresh one does almost nothing, and would not be missed
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    return path


def processor_of(size: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def picture_of(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth shapes with some noise, as photographs are; deterministic."""
    rng = np.random.default_rng([width, height])
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    planes = [np.sin(9 * x + shift) + np.cos(13 * y * (1 + shift)) for shift in (0.0, 0.7, 1.9)]
    values = np.stack(planes, axis=-1) * 60 + 128 + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert(mode)


# --- features ---------------------------------------------------------------------------------------------------------


@KINDS
@torch.no_grad()
def test_features_are_those_of_clip(folder, fast):
    encoder = encoder_of(folder, fast)
    pixels = torch.randn(3, 3, 48, 48)
    features = encoder(pixels)
    model = CLIPVisionModel.from_pretrained(folder)
    expected = model(pixel_values=pixels, output_hidden_states=True)
    assert features.shape == (3, encoder.spec.tokens_per_image, encoder.spec.width) == (3, 9, 32)
    assert torch.equal(expected.last_hidden_state, expected.hidden_states[-1])  # before the post-layernorm
    exact = model.double()(pixel_values=pixels.double()).last_hidden_state[:, 1:]
    ours, theirs = ((values - exact).square().mean().sqrt() for values in (features, expected.last_hidden_state[:, 1:]))
    assert ours < 1.5 * theirs, "another function, not other rounding"
    assert (features[0] - features[1]).abs().max() > 0.1, "pictures make no difference"


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@KINDS
def test_towers_of_every_kind(activation, dtype, fast, tmp_path):
    """In types that nothing is packed for, too; as transformers' module computes them, and from the same files."""
    CLIPVisionModel(CLIPVisionConfig(**VISION, hidden_act=activation)).save_pretrained(tmp_path)
    encoder, model = encoder_of(tmp_path, fast).to(dtype), CLIPVisionModel.from_pretrained(tmp_path)
    pixels = torch.randn(3, 3, 48, 48)
    exact = model.double()(pixel_values=pixels.double()).last_hidden_state[:, 1:]
    theirs = model.to(dtype)(pixel_values=pixels.to(dtype)).last_hidden_state[:, 1:]
    ours_off, theirs_off = ((values.double() - exact).square().mean().sqrt() for values in (encoder(pixels), theirs))
    assert ours_off < 1.5 * theirs_off + 1e-14, "another function, not other rounding"


@torch.no_grad()
def test_weights_that_are_written_to_are_noticed(folder):
    """What is packed for the products of a CPU is made again."""
    encoder, other = encoder_of(folder, fast=True), encoder_of(folder, fast=True)
    pixels = torch.randn(2, 3, 48, 48)
    before = encoder(pixels)
    for tower in (encoder.tower, other.tower):
        tower.encoder.layers[1].mlp.fc1.weight.mul_(1.5)
    assert torch.equal(encoder(pixels), other(pixels))
    assert not torch.equal(encoder(pixels), before)


@torch.no_grad()
def test_weights_stay_as_they_are_when_they_are_packed(folder):
    """The system may take their memory, not their numbers."""
    encoder = load_encoder(folder)
    tensors = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    accelerate(encoder, CPU)(torch.randn(2, 3, 48, 48))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in encoder.state_dict().items())


@torch.no_grad()
def test_packed_weights_compute_only_for_linears_that_are_torchs_own(folder):
    """A Linear that was wrapped is called, and so is a hook."""
    pixels = torch.randn(2, 3, 48, 48)
    encoder = encoder_of(folder, fast=True)
    spread(encoder, 0)  # the wide weights of `folder` multiply rounding, which differs between the kernels
    layer = encoder.tower.encoder.layers[1]
    expected, calls = encoder(pixels), []
    for module in (layer, layer.mlp.fc1):
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(encoder(pixels), expected)
        handle.remove()
    assert calls == [1, 1]
    layer.mlp.fc1 = torch.nn.Sequential(layer.mlp.fc1, torch.nn.Identity())
    torch.testing.assert_close(encoder(pixels), expected)
    layer.mlp.fc1[0].bias.add_(1.0)
    assert not torch.allclose(encoder(pixels), expected)


@torch.no_grad()
@KINDS
def test_features_from_bytes_to_the_end(folder, fast):
    """A uint8 picture, normalised inside, ends where CLIP's own processor and model end."""
    encoder = encoder_of(folder, fast)
    pictures = [picture_of(100, 70), picture_of(48, 48), picture_of(33, 90)]
    pixels = torch.from_numpy(np.stack([to_pixels(picture, 48) for picture in pictures]))
    theirs = processor_of(48)(pictures, return_tensors="pt").pixel_values
    expected = CLIPVisionModel.from_pretrained(folder)(pixel_values=theirs).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-3, rtol=1e-3)


def test_mean_and_std_of_the_folder_are_used(folder):
    encoder = load_encoder(folder)
    own = VisionEncoder(encoder.tower, VisionSpec(48, 16, 32, mean=(0.1, 0.5, 0.9), std=(0.5, 1.0, 2.0)))
    pixels = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    by_hand = torch.stack([(pixels[0, c] / 255 - m) / s for c, (m, s) in enumerate(((0.1, 0.5), (0.5, 1), (0.9, 2)))])
    torch.testing.assert_close(own(pixels), own(by_hand[None]))


def test_spec_is_read_from_the_folder(folder):
    spec = read_vision_spec(folder)
    assert (spec.image_size, spec.patch_size, spec.width, spec.tokens_per_image) == (48, 16, 32, 9)
    processor = processor_of(1)
    assert spec.mean == CLIP_MEAN == tuple(processor.image_mean)
    assert spec.std == CLIP_STD == tuple(processor.image_std)


def test_tower_stays_frozen_and_in_evaluation(folder):
    encoder = load_encoder(folder)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.train().modules())
    assert not encoder(torch.randn(1, 3, 48, 48, requires_grad=True)).requires_grad


def test_missing_and_incomplete_folders(tmp_path):
    with pytest.raises(MissingInput, match=r"config\.json"):
        load_encoder(tmp_path)
    small = CLIPVisionModel(CLIPVisionConfig(**VISION | {"num_hidden_layers": 2}))
    small.save_pretrained(tmp_path)
    CLIPVisionConfig(**VISION).save_pretrained(tmp_path)  # says three layers, the weights have two
    with pytest.raises(WeightsError, match=r"layers\.2"):
        load_encoder(tmp_path)


# --- preprocessing ----------------------------------------------------------------------------------------------------

SQUARE = [(224, 224), (64, 64), (10, 10)]
WIDE = [(640, 480), (500, 375), (65, 64), (901, 90)]
TALL = [(480, 640), (64, 67), (63, 200), (37, 41)]


@pytest.mark.parametrize("side", [64, 224])
@pytest.mark.parametrize(("width", "height"), SQUARE + WIDE + TALL)
def test_pixels_are_those_of_the_processor(width, height, side):
    compare_with_processor(picture_of(width, height), side)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK", "YCbCr", "LAB"])
def test_pixels_of_every_mode(mode):
    """Nothing here is transparent: releases of transformers differ in what they put behind that."""
    picture = picture_of(90, 121, mode)
    assert picture.mode == mode
    compare_with_processor(picture, 64)


def compare_with_processor(picture: Image.Image, side: int) -> None:
    """At most one grey level apart after the file, decoding, resizing and cropping."""
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF")  # the one format that keeps all of these modes, and keeps them exactly
    ours = load_pixels(buffer.getvalue(), "picture", side)
    processor = processor_of(side)
    processor.do_normalize = processor.do_rescale = False
    theirs = processor(picture, return_tensors="np").pixel_values[0]
    assert ours.shape == theirs.shape == (3, side, side)
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert ours.std() > 5, "the comparison would be empty"
