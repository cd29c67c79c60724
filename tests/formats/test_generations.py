"""Weights, towers and tokenizers of minimind-3v are named as such, wherever they are given."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minimind_v.core.errors import WeightsError
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.formats.load import load
from minimind_v.core.formats.vision_tower import read_tower
from tests.cli.harness import ASSETS, BASE, EYE, here, place, sighted
from tests.formats.made import saved, state

SHARED = Path(__file__).parents[2] / ".." / "shared"
NORMS = {
    "model.layers.0.self_attn.q_norm.weight": torch.ones(8),
    "model.layers.0.self_attn.k_norm.weight": torch.ones(8),
}


def wide(rows):
    """The first layer of a model that is 768 wide, with so many rows of keys."""
    return {"model.embed_tokens.weight": torch.zeros(600, 768),
            "model.layers.0.self_attn.k_proj.weight": torch.zeros(rows, 768),
            "model.layers.0.mlp.gate_proj.weight": torch.zeros(2048, 768)}  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({**state(), **NORMS}, r"weights of minimind-3v \(2026\), which have model.layers.0.self_attn.q_norm.weight;"),
        ({**state(), "vision_proj.mlp.0.weight": torch.ones(24)}, "which have vision_proj.mlp.0"),
        ({**state(), **NORMS, "vision_proj.mlp.0.weight": torch.ones(768, 3072)},
         r"in its form of April, whose vision_proj.mlp.0.weight is \[768, 3072\]"),
        (wide(384), r"minimind-3v \(2026\), whose k_proj has 384 rows"),
    ],
)  # fmt: skip
def test_weights_of_minimind_3v_are_named(tmp_path, tensors, words):
    with pytest.raises(
        WeightsError, match=rf"sft_vlm_768\.pth: .*{words}.*supports those of 2025 .*mmv download weights"
    ):
        saved(tmp_path / "sft_vlm_768.pth", tensors)


@pytest.mark.parametrize(("rows", "layers"), [(192, 1)])
def test_weights_of_2025_are_not(tmp_path, rows, layers):
    assert saved(tmp_path / "sft_vlm_768.pth", wide(rows)).config.num_hidden_layers == layers


def test_a_description_tells_more_than_the_width_of_keys(tmp_path):
    described = {"model": {"num_attention_heads": 4, "num_key_value_heads": 2}}
    (tmp_path / "w.json").write_text(json.dumps(described))
    assert saved(tmp_path / "w.pth", wide(384)).config.head_dim == 192


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_published_weights_of_minimind_3v_are_named_by_every_command(tmp_path, name):
    path = SHARED / "conformance-3v" / f"{name}.pth"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    for command in (
        ("info", path),
        ("chat", "Hello", "--model", path),
        ("eval", "--model", path, "--data", tmp_path),
        ("convert", "--to", "safetensors", "--model", path, "--out", tmp_path / "w.safetensors"),
        ("convert", "--to", "hf", "--model", path, "--out", tmp_path / "folder"),
    ):
        assert (
            "weights of minimind-3v (2026), which have model.layers.0.self_attn.q_norm.weight" in here(*command).error
        )


def siglip(folder):
    """A vision model of minimind-3v, as far as its configuration tells."""
    shutil.copytree(EYE, folder)
    config = json.loads((EYE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "siglip_vision_model"}))
    return folder


def other_words(folder):
    """The demo's tokenizer with the token that stands for a patch in minimind-3v."""
    folder.mkdir()
    text = (ASSETS / "tokenizer.json").read_text(encoding="utf-8")
    words = json.loads(text)
    token = next(token for token, id in words["model"]["vocab"].items() if id == 599)
    words["model"]["merges"] = [pair for pair in words["model"]["merges"] if "".join(pair).replace(" ", "") != token]
    words["model"]["vocab"] = {token: id for token, id in words["model"]["vocab"].items() if id != 599}
    words["added_tokens"].append({**words["added_tokens"][0], "id": 599, "content": "<|image_pad|>"})
    (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    return folder


def test_a_tower_and_a_tokenizer_of_minimind_3v_beside_weights_of_2025(tmp_path):
    tower, words = siglip(tmp_path / "siglip"), other_words(tmp_path / "words")
    with pytest.raises(
        WeightsError, match=r"siglip: the vision model belongs to minimind-3v \(2026\).*sft_vlm_128.*CLIP"
    ):
        load(sighted(), tower, ASSETS)
    with pytest.raises(
        WeightsError, match=r"words: the tokenizer belongs to minimind-3v .*<\|image_pad\|>.*sft_vlm_128"
    ):
        load(sighted(), EYE, words)
    with pytest.raises(WeightsError, match="the vision model belongs to minimind-3v"):
        read_tower(tower)


def test_a_run_does_not_mix_the_generations(tmp_path):
    tower, words = siglip(tmp_path / "siglip"), other_words(tmp_path / "words")
    line = here(*place().train(tmp_path / "out", vision_model=tower)).error
    assert "siglip: the vision model belongs to minimind-3v (2026) (SigLIP), but the weights of 2025 in" in line
    assert BASE.name in line
    line = here(*place().train(tmp_path / "out", tokenizer=words)).error
    assert "the tokenizer belongs to minimind-3v (2026)" in line
    assert BASE.name in line
    line = here(*place().train(tmp_path / "out", init="none", tokenizer=words)).error
    assert "but the model of 2025 needs the tokenizer of 2025" in line


@pytest.mark.skipif(not (SHARED / "tokenizer-3v").is_dir(), reason="the tokenizer of minimind-3v is not here")
def test_the_real_tokenizer_of_minimind_3v_is_named():
    with pytest.raises(WeightsError, match="the tokenizer belongs to minimind-3v"):
        load(sighted(), EYE, SHARED / "tokenizer-3v")


def test_a_base_whose_head_alone_is_stored_is_the_same_model(tmp_path):
    tensors = state()
    del tensors["model.embed_tokens.weight"]
    checkpoint = saved(tmp_path / "w.pth", tensors)
    assert torch.equal(checkpoint.tensors["model.embed_tokens.weight"], state()["model.embed_tokens.weight"])
    assert checkpoint.parameters == read_checkpoint(tmp_path / "w.pth").parameters
