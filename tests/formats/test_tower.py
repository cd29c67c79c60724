"""A vision tower as it lies in its folder: every layout, what transformers makes of it, and what does not fit."""

import contextlib
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from minimind_v.core.errors import MissingInput, WeightsError
from minimind_v.core.formats.vision_tower import load_encoder, read_tower
from tests.cli.harness import EYE
from tests.formats.towers import LAYOUTS, llava, tower_tensors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tower_is_what_transformers_loads(layout, tmp_path):
    layout(tmp_path)
    if layout is llava:
        theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path).model.vision_tower
    else:
        theirs = CLIPVisionModel.from_pretrained(tmp_path)
    expected = theirs.float().state_dict()
    stored, loaded = read_tower(tmp_path), load_encoder(tmp_path)
    assert stored.tensors.keys() == loaded.tower.state_dict().keys() == expected.keys()
    assert all(torch.equal(stored.tensors[name].float(), tensor) for name, tensor in expected.items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.tower.state_dict().items())
    assert all(getattr(theirs.config, name) == value for name, value in vars(stored.config).items())
    assert stored.spec == loaded.spec


def test_a_tower_that_is_not_whole_is_refused(tmp_path):
    shutil.copy(EYE / "config.json", tmp_path)
    tensors = tower_tensors()
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"1 tensors of the vision model are missing, .*encoder\.layers\.1\.mlp\.fc1"
    ):
        read_tower(tmp_path)
    save_file(tensors | {name: tensors[name][:5].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"could not be loaded \(encoder\.layers\.1\.mlp\.fc1\.weight is \[5, 128\]"):
        read_tower(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((EYE / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(WeightsError, match="truncated or damaged"):
        read_tower(tmp_path)


def test_without_its_last_norm_a_tower_is_whole(tmp_path):
    shutil.copy(EYE / "config.json", tmp_path)
    save_file({name: tensor for name, tensor in tower_tensors().items() if "post_layernorm" not in name},
              tmp_path / "model.safetensors")  # fmt: skip
    assert torch.equal(read_tower(tmp_path).tensors["post_layernorm.weight"], torch.ones(128))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None"),
        ({"num_attention_heads": 5}, "a width of 128 does not divide into 5 heads"),
        ({"patch_size": 4.5}, "patch_size is 4.5"),
        ({"hidden_act": ["gelu"]}, "hidden_act is"),
        ({"vision_config": None}, "vision_config is not an object"),
        ({"hidden_size": 10**9}, "in config.json hidden_size is 1000000000; the maximum is 4,096"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; the maximum is 256"),
        ({"image_size": 10**6}, "image_size is 1000000; the maximum is 4,096"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": 10**9}, "patch_size is 1000000000; the maximum is 128"),
        ({"image_size": 4096, "patch_size": 1}, "16,777,216 patches of patch_size 1, not 1 to 16,384"),
        ({"image_size": 8, "patch_size": 16}, "has 0 patches"),
        ({"num_channels": 1}, "num_channels is 1, images have 3"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 256}, "parameters; the maximum is"),
        ({"num_hidden_layers": 1}, r"encoder\.layers\.[1-9]\S*, but config.json has 1 layer\)"),
        ({"hidden_act": "tanhshrink"}, "activation 'tanhshrink' is not one of quick_gelu, gelu"),
    ],
)
def test_a_configuration_that_no_tower_has(tmp_path, changes, message):
    shutil.copy(EYE / "model.safetensors", tmp_path)
    config = json.loads((EYE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(WeightsError, match=message):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_std": [0, 0.5, 0.5]}, r"in preprocessor_config.json image_std is \[0, 0.5, 0.5\], not three numbers"),
        ({"image_std": [float("nan")] * 3}, "image_std is .*nan"),
        ({"image_mean": [float("nan"), 0.5, 0.5]}, "image_mean is .*, not three numbers from 0 to 1"),
        ({"image_mean": [123.675, 116.28, 103.53]}, "image_mean is"),
        ({"image_mean": [float("inf")] * 3}, "image_mean is"),
        ({"image_mean": 0.5}, "image_mean is 0.5"),
        ({"image_mean": [0.5]}, "image_mean is"),
        ({"image_mean": ["0.5"] * 3}, "image_mean is"),
        ({"image_mean": None}, "image_mean is None"),
        ({"size": {"shortest_edge": 10**9}}, "size is .*, not sizes from 1 to 4,096"),
        ({"crop_size": -224}, "crop_size is -224"),
    ],
)
def test_a_preprocessing_that_makes_no_picture(tmp_path, settings, message):
    for path in EYE.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=message) as caught:
        read_tower(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": 64, "crop_size": {"height": 64, "width": 64}},
        {"size": {"shortest_edge": 64, "longest_edge": None}},
    ],
)
def test_preprocessings_of_every_age_are_read(tmp_path, settings):
    for path in EYE.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert read_tower(tmp_path).spec.mean


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensor: tensor.index_fill(0, torch.tensor([0]), float("nan")), "contains NaN or infinite values"),
        (lambda tensor: tensor.index_fill(0, torch.tensor([0]), float("inf")), "contains NaN or infinite values"),
        (lambda tensor: tensor.to(torch.int8), r"is not plain floating point \(int8\)"),
        (lambda tensor: tensor.long(), "is not plain floating point"),
    ],
    ids=["NaN", "infinite", "int8", "int64"],
)
@pytest.mark.parametrize("ending", ["layers.0.mlp.fc1.weight", "class_embedding", "post_layernorm.bias"])
def test_a_tower_of_something_else_than_numbers_is_refused(tmp_path, spoil, message, ending):
    shutil.copy(EYE / "config.json", tmp_path)
    tensors = tower_tensors()
    name = next(name for name in tensors if name.endswith(ending))
    save_file(tensors | {name: spoil(tensors[name].float())}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"{ending} {message}"):
        read_tower(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(MissingInput, match=r"config\.json is missing"):
        read_tower(tmp_path)
    shutil.copy(EYE / "config.json", tmp_path)
    with pytest.raises(WeightsError, match="no weights"):
        read_tower(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("<!doctype html>")
    with pytest.raises(WeightsError, match="HTML page"):
        read_tower(tmp_path)


def test_any_changed_byte_ends_in_words_or_in_a_tower(tmp_path):
    draw = random.Random(2)
    for path in EYE.iterdir():
        shutil.copy(path, tmp_path)
    for _ in range(60):
        for path in EYE.iterdir():
            damaged = bytearray(path.read_bytes())
            for _ in range(draw.choice((0, 1, 2))):
                damaged[draw.randrange(min(len(damaged), 4000))] = draw.choice(b'0159"{}[],:-.e\0\xff')
            (tmp_path / path.name).write_bytes(damaged)
        with contextlib.suppress(WeightsError):
            assert read_tower(tmp_path).tensors


def test_numbers_that_float32_does_not_hold_are_refused(tmp_path):
    shutil.copy(EYE / "config.json", tmp_path)
    tensors = tower_tensors()
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    save_file(tensors | {name: tensors[name].double() * 1e300}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.fc1\.weight contains NaN or infinite"):
        read_tower(tmp_path)
