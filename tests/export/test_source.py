"""The parts of a model as they lie in their files: every layout of a vision folder, and what does not fit."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimind_v.core.checkpoint.keys import published_shapes
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.errors import WeightsError
from minimind_v.core.export.source import read_source, read_tower
from minimind_v.core.model.vision import VisionEncoder
from minimind_v.core.model.vision_spec import VisionSpec
from minimind_v.core.model.vlm import VLM
from tests.cli.harness import EYE, here
from tests.export.made import CONFIGS, exported, order, weights


@pytest.mark.parametrize("config", [*CONFIGS.values(), *PRESETS.values()], ids=[*CONFIGS, *PRESETS])
def test_a_checkpoint_has_the_tensors_of_the_model(config):
    with torch.device("meta"):
        model = VLM(config, VisionSpec(64, 8, 48), placeholder_id=5)
    assert published_shapes(config, 48) == {name: tensor.shape for name, tensor in model.state_dict().items()}


def whole_clip(folder):
    """As CLIP itself is published: both halves in one file that torch saved."""
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in eye().items()}
    tensors |= {"text_model.embeddings.token_embedding.weight": torch.ones(9, 4), "logit_scale": torch.tensor(1.0),
                "vision_model.embeddings.position_ids": torch.arange(65)[None]}  # fmt: skip
    torch.save(tensors, folder / "pytorch_model.bin")
    vision = json.loads((EYE / "config.json").read_text())
    told = {"model_type": "clip", "vision_config": vision, "text_config": {"hidden_size": 4}}
    (folder / "config.json").write_text(json.dumps(told))


def shards(folder):
    names = sorted(eye())
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: eye()[name] for name in held}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(EYE / "config.json", folder)


def llava(folder):
    for path in exported().iterdir():
        shutil.copy(path, folder)


def eye():
    return load_file(EYE / "model.safetensors")


@pytest.mark.parametrize("layout", [whole_clip, shards, llava])
def test_a_tower_is_what_transformers_loads(layout, tmp_path):
    layout(tmp_path)
    loaded, found = VisionEncoder.load(tmp_path), read_tower(tmp_path)
    wanted = {name.removeprefix("vision_model."): tensor for name, tensor in loaded.tower.state_dict().items()}
    assert found.tensors.keys() == wanted.keys()
    assert all(torch.equal(found.tensors[name].float(), tensor) for name, tensor in wanted.items())
    assert (found.spec, found.config["hidden_size"]) == (loaded.spec, loaded.tower.config.hidden_size)
    out = tmp_path / "out"
    sight = ("--vision-model", tmp_path, "--tokenizer", order().tokenizer)
    assert here("convert", "--to", "hf", "--model", weights("dense"), *sight, "--out", out, "--no-verify").code == 0


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


def test_reading_needs_no_transformers():
    """Whose import takes longer than all the rest."""
    code = (
        "import sys; from minimind_v.core.export.source import read_source; from minimind_v.core.export import hf; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert read_source(order()).checkpoint.stage == "sft"
