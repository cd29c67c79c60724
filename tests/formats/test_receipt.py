"""Loading is strict, and says what happened to every tensor."""

import re
from dataclasses import replace

import pytest
import torch

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schema import TextConfig
from minimind_v.core.errors import WeightsError
from minimind_v.core.formats.checkpoint import Checkpoint, load_into
from minimind_v.core.model.vision.encoder import VisionSpec
from tests.formats.made import DENSE, MOE, model, saved, state, text_only, written

TIED = ["lm_head.weight", "model.embed_tokens.weight"]
PROJECTOR = ["vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"]


@pytest.fixture
def load(tmp_path):
    """Loads tensors into a fresh model by way of a file."""

    def run(tensors, config=DENSE, **how):
        fresh = model(config, seed=1)
        return fresh, load_into(fresh, saved(tmp_path / "w.pth", tensors), **how)

    return run


def refused(load, tensors, config=DENSE, **how):
    with pytest.raises(WeightsError) as caught:
        load(tensors, config, **how)
    return str(caught.value)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "experts"])
def test_a_whole_file_loads_wholly(load, config):
    fresh, receipt = load(state(config), config)
    assert sorted(receipt.loaded) == sorted(state(config))
    assert receipt.missing == receipt.unexpected == receipt.wrong_shape == receipt.new == []
    assert all(torch.equal(tensor.half(), state(config)[name]) for name, tensor in fresh.state_dict().items())
    assert str(receipt).endswith(f"w.pth: {len(state(config))} tensors loaded")


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_are_read_under_either_name(load, name):
    tensors = state()
    kept = tensors[next(other for other in TIED if other != name)]
    del tensors[name]
    fresh, receipt = load(tensors)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert torch.equal(fresh.lm_head.weight.half(), kept)
    assert len(receipt.loaded) == len(state())


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_is_not_tied_is_refused(load, name):
    tensors = state()
    tensors[name] = tensors[name] + 1
    assert "lm_head.weight and model.embed_tokens.weight differ, but must be tied" in refused(load, tensors)
    tensors[name] = torch.zeros(62, 32)
    assert "differ, but must be tied ([6" in refused(load, tensors)


def test_a_name_in_two_forms_is_refused(load):
    line = refused(load, {**state(), "module.model.norm.weight": torch.ones(32)})
    assert "contains model.norm.weight and module.model.norm.weight, which mean the same tensor" in line


def test_a_token_that_was_added_later_is_not_lost(load):
    line = refused(load, state(replace(DENSE, vocab_size=63)))
    assert "they have 63 tokens and the model 61: add --set model.vocab_size=63" in line


@pytest.mark.parametrize("name", [name for name in state() if name not in TIED])
def test_any_single_tensor_that_is_missing_is_named(load, name):
    tensors = state()
    del tensors[name]
    line = refused(load, tensors, new_projector=True)
    assert f"1 missing ({name})" in line or "not the weights of a MiniMind model" in line


def test_many_missing_tensors_are_counted(load):
    tensors = {name: tensor for name, tensor in state().items() if ".mlp." not in name or ".layers.0." in name}
    assert "3 missing (model.layers.1.mlp.gate_proj.weight, " in refused(load, tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if "layernorm" not in name}
    assert re.search(r"7 missing \((\S+, ){2}\S+ and 4 more\)", refused(load, tensors))


def test_an_unexpected_tensor_is_named(load):
    line = refused(load, {**state(), "model.layers.0.lora.weight": torch.ones(2)})
    assert line.endswith("1 unexpected (model.layers.0.lora.weight)")


def test_a_wrong_shape_is_named_with_both_shapes(load):
    line = refused(load, {**state(), "model.norm.weight": torch.ones(31)})
    assert "1 wrong shape (model.norm.weight [31] for [32])" in line
    name = "model.layers.1.mlp.down_proj.weight"
    line = refused(load, {**state(), name: state()[name].t()})
    assert f"1 wrong shape ({name} [48, 32] for [32, 48])" in line


def test_nothing_is_loaded_where_something_is_wrong(tmp_path):
    fresh = model(seed=1)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    for wrong in (
        {"extra": torch.ones(1)},
        {"model.norm.weight": torch.ones(31)},
        {"lm_head.weight": torch.ones(61, 32)},
    ):
        with pytest.raises(WeightsError):
            load_into(fresh, saved(tmp_path / "w.pth", {**state(), **wrong}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


# --- text-only bases --------------------------------------------------------------------------------------------------


def test_a_text_only_base_gets_a_new_projector_where_it_is_required(load):
    fresh, receipt = load(text_only(state()), new_projector=True)
    assert receipt.new == PROJECTOR
    assert str(receipt).endswith(f"2 new ({', '.join(PROJECTOR)})")
    kept = model(seed=1).vision_proj.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in fresh.vision_proj.state_dict().items())


def test_a_text_only_base_is_refused_elsewhere(load):
    line = refused(load, text_only(state()))
    assert line.endswith("this text-only base has no projector; `mmv train pretrain` trains one")


@pytest.mark.parametrize("kept", PROJECTOR)
def test_half_a_projector_is_refused_always(load, kept):
    tensors = {**text_only(state()), kept: state()[kept]}
    for new_projector in (True, False):
        assert "1 missing (vision_proj" in refused(load, tensors, new_projector=new_projector)


def test_a_projector_that_is_there_is_loaded(load):
    fresh, receipt = load(state(), new_projector=True)
    assert receipt.new == []
    assert torch.equal(fresh.vision_proj.vision_proj[0].weight.half(), state()[PROJECTOR[0]])


def test_a_new_projector_excuses_nothing_else(load):
    tensors = text_only(state())
    del tensors["model.norm.weight"]
    line = refused(load, tensors, new_projector=True)
    assert "3 missing (" in line
    assert "model.norm.weight" in line


# --- what would fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_weights_of_another_size_name_their_preset(tmp_path, name):
    """Without making them: shapes are enough, and `base` has a hundred million numbers."""
    config = PRESETS[name]
    checkpoint = Checkpoint(
        tmp_path / "w.pth", {"model.norm.weight": torch.ones(config.hidden_size)}, config, "lm", [], True
    )
    with pytest.raises(WeightsError, match=f"(its sizes match|— add) --preset {name}($|, or name other weights)"):
        load_into(model(), checkpoint)


def test_sizes_without_a_preset_are_reported_in_numbers(load):
    other = TextConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=6, vocab_size=61)
    assert refused(load, state(other)).endswith("its sizes are 48 × 3 layers")


def test_experts_for_a_dense_model_and_the_other_way_round(load):
    assert "unexpected (model.layers.0.mlp.experts.0.gate_proj.weight" in refused(load, state(MOE), DENSE)
    assert "missing (model.layers.0.mlp.experts.0.gate_proj.weight" in refused(load, state(DENSE), MOE)


def test_a_projector_of_another_vision_model_is_reported(tmp_path):
    wide = model(spec=VisionSpec(image_size=16, patch_size=8, width=40))
    with pytest.raises(WeightsError, match=r"it needs a vision model with features of width 24 \(--vision-model\)$"):
        load_into(wide, saved(tmp_path / "w.pth", state()))


@pytest.mark.parametrize(("name", "value"), [("num_attention_heads", 8), ("rope_theta", 1e4), ("rms_norm_eps", 1e-6)])
def test_a_size_that_changes_no_shape_must_agree_with_the_file(tmp_path, name, value):
    """Such weights would load, and compute something else."""
    heads = {"num_key_value_heads": 4} if name == "num_attention_heads" else {}
    config = TextConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
        | heads
        | {name: value}
    )
    plain = TextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
    with pytest.raises(WeightsError, match=f"{name} .*--set model.{name}="):
        load_into(model(plain), written(tmp_path / "w.pth", config))
    load_into(model(config), written(tmp_path / "w.pth", config))
