"""A vision tower as it lies in its folder: every layout, what transformers makes of it, and what does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from minimind_v.core.checkpoint.tower import read_tower
from minimind_v.core.errors import MissingInput, WeightsError
from minimind_v.core.model.vision import VisionEncoder
from tests.checkpoint.towers import LAYOUTS, eye, llava
from tests.cli.harness import EYE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tower_is_what_transformers_loads(layout, tmp_path):
    layout(tmp_path)
    if layout is llava:
        theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path).model.vision_tower
    else:
        theirs = CLIPVisionModel.from_pretrained(tmp_path)
    wanted = theirs.float().state_dict()
    found, loaded = read_tower(tmp_path), VisionEncoder.load(tmp_path)
    assert found.tensors.keys() == loaded.tower.state_dict().keys() == wanted.keys()
    assert all(torch.equal(found.tensors[name].float(), tensor) for name, tensor in wanted.items())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.tower.state_dict().items())
    assert all(getattr(theirs.config, name) == value for name, value in vars(found.config).items())
    assert found.spec == loaded.spec


def test_a_tower_that_is_not_whole_is_refused(tmp_path):
    shutil.copy(EYE / "config.json", tmp_path)
    tensors = eye()
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"1 tensors of the vision model are missing, .*encoder\.layers\.1\.mlp\.fc1"
    ):
        read_tower(tmp_path)
    save_file(tensors | {name: tensors[name][:5].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"does not load \(encoder\.layers\.1\.mlp\.fc1\.weight is \[5, 128\]"):
        read_tower(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((EYE / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(WeightsError, match="truncated or damaged"):
        read_tower(tmp_path)


def test_without_its_last_norm_a_tower_is_whole(tmp_path):
    shutil.copy(EYE / "config.json", tmp_path)
    save_file({name: tensor for name, tensor in eye().items() if "post_layernorm" not in name},
              tmp_path / "model.safetensors")  # fmt: skip
    assert torch.equal(read_tower(tmp_path).tensors["post_layernorm.weight"], torch.ones(128))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None"),
        ({"num_attention_heads": 5}, "5 heads cannot share a width of 128"),
        ({"patch_size": 4.5}, "patch_size is 4.5"),
        ({"hidden_act": ["gelu"]}, "hidden_act is"),
        ({"vision_config": None}, "vision_config is no object"),
        ({"hidden_act": "tanhshrink"}, "activation 'tanhshrink' is none of quick_gelu, gelu"),
    ],
)
def test_a_configuration_that_no_tower_has(tmp_path, told, said):
    shutil.copy(EYE / "model.safetensors", tmp_path)
    config = json.loads((EYE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | told))
    with pytest.raises(WeightsError, match=said):
        VisionEncoder.load(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(MissingInput, match=r"config\.json is missing"):
        read_tower(tmp_path)
    shutil.copy(EYE / "config.json", tmp_path)
    with pytest.raises(WeightsError, match="no weights"):
        read_tower(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("<!doctype html>")
    with pytest.raises(WeightsError, match="HTML page"):
        read_tower(tmp_path)
