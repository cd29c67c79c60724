"""Loading everything that talking to a model takes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from minimind_v.core.errors import MissingInput, UsageError, WeightsError
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.formats.load import load
from minimind_v.core.hub.sources import find_weights
from tests.cli.harness import ASSETS, BASE, EYE, sighted


def test_what_is_loaded_is_what_the_file_holds():
    loaded = load(sighted(), EYE, ASSETS, "cpu")
    held = read_checkpoint(sighted()).tensors
    assert all(torch.equal(loaded.model.state_dict()[name], tensor.float()) for name, tensor in held.items())
    assert not loaded.model.training
    assert len(loaded.receipt.loaded) == len(held)
    assert loaded.model.config == loaded.checkpoint.config


def test_nothing_is_drawn_or_imported_that_is_not_used():
    """Before an answer, importing is most of the time: of transformers, and of the compiler behind some of torch."""
    before = torch.get_rng_state()
    load(sighted(), EYE, ASSETS, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    code = (
        "import sys; from pathlib import Path; from minimind_v.core.formats.load import load; "
        "load(*map(Path, sys.argv[1:]), device='cpu'); "
        "assert not {'transformers', 'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, sighted(), EYE, ASSETS], check=True)


def test_inputs_that_do_not_belong_together_are_reported(tmp_path):
    with pytest.raises(WeightsError, match=r"text-only base has no projector"):
        load(BASE, EYE, ASSETS)
    other = json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8"))
    other["added_tokens"].append({**other["added_tokens"][0], "id": 600, "content": "<new>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"has 600 tokens, .* has 601: '<new>' has no embedding .*\(--tokenizer\)"):
        load(sighted(), EYE, tmp_path)
    with pytest.raises(UsageError, match="--device gpu"):
        load(sighted(), EYE, ASSETS, "gpu")


def test_a_vision_model_of_another_width_is_reported(tmp_path):
    shutil.copytree(EYE, tmp_path / "eye")
    (tmp_path / "eye" / "model.safetensors").unlink()
    config = CLIPVisionConfig.from_pretrained(EYE)
    config.hidden_size = 64
    CLIPVisionModel(config).save_pretrained(tmp_path / "eye")
    with pytest.raises(
        WeightsError, match=r"trained with features of width 128, .* yields width 64 — .*--vision-model"
    ):
        load(sighted(), tmp_path / "eye", ASSETS)


def touch(folder, name, time):
    path = folder / name
    path.touch()
    os.utime(path, (time, time))
    return path


def test_the_latest_stage_is_found_and_of_it_the_newest(tmp_path):
    with pytest.raises(MissingInput, match="run `mmv train pretrain`, `mmv train sft`, or `mmv demo`"):
        find_weights(tmp_path)
    with pytest.raises(MissingInput):
        find_weights(tmp_path / "nowhere")
    touch(tmp_path, "lm_512.pth", 900)
    touch(tmp_path, "sft_vlm_512.json", 900)
    with pytest.raises(MissingInput):
        find_weights(tmp_path)
    pretrain = touch(tmp_path, "pretrain_vlm_512.pth", 500)
    assert find_weights(tmp_path) == pretrain
    old = touch(tmp_path, "sft_vlm_512.pth", 100)
    assert find_weights(tmp_path) == old
    new = touch(tmp_path, "sft_vlm_640_moe.pth", 200)
    assert find_weights(tmp_path) == new
