"""A file says which generation it is of; both are opened, and a mix of them is refused in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minimind_v.core.config.presets import PRESETS, name_preset
from minimind_v.core.errors import WeightsError
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.formats.description import infer_config
from minimind_v.core.formats.hf.names import published_shapes
from minimind_v.core.formats.load import load
from tests.cli.harness import ASSETS, BASE, EYE, SIGHT, run_mmv, sighted, tiny_data
from tests.formats.made import saved, state
from tests.formats.made3v import DENSE, MOE, tiny_3v, tiny_siglip, tiny_state
from tests.tokenizers_made import thinking_tokenizer

SHARED = Path(__file__).parents[2] / ".." / "shared"
NUMBERS = Path(os.environ.get("MMV_CONFORMANCE_3V", SHARED / "conformance-3v"))
NORMS = {
    "model.layers.0.self_attn.q_norm.weight": torch.ones(8),
    "model.layers.0.self_attn.k_norm.weight": torch.ones(8),
}


def wide(rows):
    """The first layer of a model that is 768 wide, with so many rows of keys."""
    return {"model.embed_tokens.weight": torch.zeros(600, 768),
            "model.layers.0.self_attn.q_proj.weight": torch.zeros(768, 768),
            "model.layers.0.self_attn.k_proj.weight": torch.zeros(rows, 768),
            "model.layers.0.mlp.gate_proj.weight": torch.zeros(2048, 768)}  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**state(), **NORMS, "vision_proj.mlp.0.weight": torch.ones(768, 3072)},
         r"in its form of April \(vision_proj.mlp.0.weight is \[768, 3072\], for SigLIP2 NaFlex\)"),
        (wide(384), r"without the norms of its heads \(k_proj has 384 rows, and there is no self_attn.q_norm\)"),
    ],
)  # fmt: skip
def test_forms_that_are_not_computed_are_named(tmp_path, tensors, message):
    message = rf"sft_vlm_768\.pth: weights of minimind-3v \(2026\) {message}; .*`mmv download weights --preset 3v`"
    with pytest.raises(WeightsError, match=message):
        saved(tmp_path / "sft_vlm_768.pth", tensors)


@pytest.mark.parametrize("preset", ["base", "3v"])
def test_one_name_is_of_both_generations_and_the_tensors_decide(tmp_path, preset):
    """`sft_vlm_768.pth` was published in 2025 and in 2026."""
    shapes = published_shapes(PRESETS[preset])
    tensors = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    config = infer_config(tmp_path / "sft_vlm_768.pth", tensors)
    assert name_preset(config) == preset
    assert config == PRESETS[preset]


def test_weights_of_2025_keep_their_two_key_value_heads(tmp_path):
    assert saved(tmp_path / "sft_vlm_768.pth", wide(192)).config.num_attention_heads == 8


def test_a_description_holds_more_than_the_width_of_keys(tmp_path):
    described = {"model": {"num_attention_heads": 4, "num_key_value_heads": 2}}
    (tmp_path / "w.json").write_text(json.dumps(described))
    assert saved(tmp_path / "w.pth", wide(384)).config.head_dim == 192


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_weights_of_2026_are_read_by_their_shapes_alone(tmp_path, config):
    checkpoint = saved(tmp_path / "w.pth", tiny_state(config))
    assert checkpoint.config == config
    assert (checkpoint.projector, checkpoint.vision_width, checkpoint.guessed) == ("mlp", 24, True)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("prefix", ["", "model.", "module.whole."])
def test_a_published_folder_of_2026_is_opened_without_its_code(tmp_path, config, prefix):
    """Its modules may stand below a prefix, and its config.json has other names."""
    weights, tower, tokenizer = tiny_3v(tmp_path, config)
    folder = tmp_path / "minimind-3v"
    folder.mkdir()
    tensors = tiny_state(config)
    save_file({prefix + name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    described = {
        "model_type": "minimind-v", "auto_map": {"AutoModelForCausalLM": "model_vlm.MiniMindVLM"}, "hidden_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 600,
        "intermediate_size": 64, "moe_intermediate_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "use_moe": config.use_moe, "num_experts": 4, "num_experts_per_tok": 1, "router_aux_loss_coef": 5e-4,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "model_vlm.py").write_text("raise SystemExit('custom code ran')")
    theirs, ours = load(folder, tower, tokenizer, "cpu"), load(weights, tower, tokenizer, "cpu")
    assert theirs.config == ours.config
    ids = torch.arange(20, 40)[None]
    assert torch.equal(theirs.model(ids).logits, ours.model(ids).logits)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_published_weights_of_2026_are_opened(name):
    if not (NUMBERS / f"{name}.pth").is_file() or not (SHARED / "tokenizer-3v").is_dir():
        pytest.skip(f"{NUMBERS} and the tokenizer of minimind-3v are not here")
    loaded = load(NUMBERS / f"{name}.pth", NUMBERS / "tower", SHARED / "tokenizer-3v", "cpu")
    assert (loaded.config.projector, loaded.tokenizer.layout) == ("mlp", "chatml-think")
    assert loaded.config.text.qk_norm
    assert not loaded.receipt.missing
    assert not loaded.receipt.unexpected


def test_a_tower_and_a_tokenizer_of_2026_beside_weights_of_2025(tmp_path):
    tower, tokenizer_folder = tiny_siglip(tmp_path / "siglip"), thinking_tokenizer(tmp_path / "words")
    with pytest.raises(
        WeightsError, match=r"siglip: the vision model belongs to minimind-3v \(2026\) .*sft_vlm_128.*need CLIP"
    ):
        load(sighted(), tower, ASSETS)
    with pytest.raises(
        WeightsError, match=r"words: the tokenizer belongs to minimind-3v .*it has <\|image_pad\|>.*sft_vlm_128"
    ):
        load(sighted(), EYE, tokenizer_folder)


def test_a_tower_and_a_tokenizer_of_2025_beside_weights_of_2026(tmp_path):
    weights, tower, tokenizer_folder = tiny_3v(tmp_path)
    with pytest.raises(
        WeightsError,
        match=r"the vision model belongs to MiniMind-V \(2025\) \(CLIP\), but the weights of 2026 in .*sft_vlm_48.pth "
        r"need SigLIP — .*`mmv download clip --preset 3v`",
    ):
        load(weights, EYE, tokenizer_folder)
    with pytest.raises(
        WeightsError,
        match=r"the tokenizer belongs to MiniMind-V \(2025\) \(it has no <\|image_pad\|>\).*sft_vlm_48.*"
        "`mmv download tokenizer --preset 3v`",
    ):
        load(weights, tower, ASSETS)


def test_a_tower_that_does_not_name_its_kind_is_clip(tmp_path):
    weights, _, tokenizer_folder = tiny_3v(tmp_path)
    shutil.copytree(EYE, tmp_path / "unnamed")
    config = json.loads((EYE / "config.json").read_text(encoding="utf-8"))
    del config["model_type"]
    (tmp_path / "unnamed" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"unnamed: the vision model belongs to MiniMind-V \(2025\)"):
        load(weights, tmp_path / "unnamed", tokenizer_folder)


def test_a_gguf_of_2025_beside_weights_of_2026(tmp_path):
    weights, tower, tokenizer_folder = tiny_3v(tmp_path)
    exported = tmp_path / "exported"
    run_mmv("convert", "--to", "gguf", "--model", sighted(), "--out", exported, "--no-verify", *SIGHT)
    with pytest.raises(WeightsError, match=r"exported: the vision model belongs to MiniMind-V \(2025\)"):
        load(weights, exported, tokenizer_folder)
    with pytest.raises(WeightsError, match=r"exported: the tokenizer belongs to MiniMind-V \(2025\)"):
        load(weights, tower, exported)


def test_a_run_does_not_mix_the_generations(tmp_path):
    tower, tokenizer_folder = tiny_siglip(tmp_path / "siglip"), thinking_tokenizer(tmp_path / "words")
    line = run_mmv(*tiny_data().train(tmp_path / "out", vision_model=tower)).error
    assert "siglip: the vision model belongs to minimind-3v (2026) (SigLIP), but the weights of 2025 in" in line
    assert BASE.name in line
    line = run_mmv(*tiny_data().train(tmp_path / "out", tokenizer=tokenizer_folder)).error
    assert "the tokenizer belongs to minimind-3v (2026)" in line
    assert BASE.name in line
    line = run_mmv(*tiny_data().train(tmp_path / "out", init="none", tokenizer=tokenizer_folder)).error
    assert "but the model of 2025 needs the tokenizer of 2025" in line
    torch.save({name: value for name, value in tiny_state().items() if "vision" not in name}, tmp_path / "llm_48.pth")
    line = run_mmv(*tiny_data().train(tmp_path / "out", init=tmp_path / "llm_48.pth")).error
    assert "llm_48.pth: these weights belong to minimind-3v (2026), but the run trains MiniMind-V (2025)" in line
    assert "--preset 3v" in line


@pytest.mark.parametrize("tower", ["of its generation", "missing"])
def test_a_base_of_the_other_generation_is_named_before_its_tower(tmp_path, tower):
    folder, tokenizer_folder = tiny_siglip(tmp_path / "siglip"), thinking_tokenizer(tmp_path / "words")
    init = tmp_path / "llm_48.pth"
    torch.save({name: value for name, value in tiny_state().items() if "vision" not in name}, init)
    folder = folder if tower == "of its generation" else tmp_path / "nothing"
    paths = {"init": init, "vision_model": folder, "tokenizer": tokenizer_folder}
    line = run_mmv(*tiny_data().train(tmp_path / "out", **paths)).error
    assert "llm_48.pth: these weights belong to minimind-3v (2026), but the run trains MiniMind-V (2025)" in line
    assert "add --preset 3v" in line


@pytest.mark.skipif(not (SHARED / "tokenizer-3v").is_dir(), reason="the tokenizer of minimind-3v is not here")
def test_the_real_tokenizer_of_minimind_3v_is_named():
    with pytest.raises(WeightsError, match="the tokenizer belongs to minimind-3v"):
        load(sighted(), EYE, SHARED / "tokenizer-3v")


def test_the_standard_folders_are_those_of_the_weights_generation(tmp_path, monkeypatch):
    from minimind_v.core.paths import TOKENIZER_3V_DIR, VISION_3V_DIR

    monkeypatch.chdir(tmp_path)
    weights, tower, tokenizer_folder = tiny_3v(tmp_path / "parts")
    shutil.copytree(EYE, "model/vision_model/clip-vit-base-patch16")
    shutil.copy(ASSETS / "tokenizer.json", "model")
    shutil.copytree(tower, VISION_3V_DIR)
    shutil.copytree(tokenizer_folder, TOKENIZER_3V_DIR)
    assert load(weights, device="cpu").tokenizer.layout == "chatml-think"
    assert load(sighted(), device="cpu").tokenizer.layout == "chatml"


def test_a_base_whose_head_alone_is_stored_is_the_same_model(tmp_path):
    tensors = state()
    del tensors["model.embed_tokens.weight"]
    checkpoint = saved(tmp_path / "w.pth", tensors)
    assert torch.equal(checkpoint.tensors["model.embed_tokens.weight"], state()["model.embed_tokens.weight"])
    assert checkpoint.parameters == read_checkpoint(tmp_path / "w.pth").parameters
