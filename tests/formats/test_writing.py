"""What is saved can be read by anybody, and by us with nothing lost."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from minimind_v.core.config.presets import PRESETS, name_preset, weights_name
from minimind_v.core.config.schema import TextConfig
from minimind_v.core.errors import RunError, WeightsError
from minimind_v.core.formats.checkpoint import (
    export_tensors,
    load_into,
    read_checkpoint,
    write_checkpoint,
)
from minimind_v.core.formats.description import infer_config
from tests.cli.harness import BASE, sighted, sighted_model
from tests.formats.made import DENSE, MOE, model, state, text_only, written

PER_LAYER = [
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *(f"self_attn.{letter}_proj.weight" for letter in "qkvo"),
]
FEED_FORWARD = [f"{letter}_proj.weight" for letter in ("gate", "up", "down")]
AROUND = [
    *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    *("vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"),
]
EXPERTS = [f"experts.{n}" for n in range(4)] + ["shared_experts.0"]


def published(layers, feed_forward):
    inside = [*PER_LAYER, *(f"mlp.{name}" for name in feed_forward)]
    return {*AROUND, *(f"model.layers.{n}.{name}" for n in range(layers) for name in inside)}


def test_the_names_are_exactly_the_published_ones():
    assert set(state(DENSE)) == published(2, FEED_FORWARD)
    experts = [f"{expert}.{name}" for expert in EXPERTS for name in FEED_FORWARD]
    assert set(state(MOE)) == published(2, [*experts, "gate.weight"])


def test_the_vision_encoder_is_never_saved():
    whole = sighted_model()
    assert any(name.startswith("vision_encoder.") for name in whole.state_dict())
    assert set(export_tensors(whole)) == published(4, FEED_FORWARD)


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        *(("small", "sft_vlm_512.pth"), ("base", "sft_vlm_768.pth")),
        *(("moe", "sft_vlm_640_moe.pth"), ("demo", "sft_vlm_128.pth")),
    ],
)
def test_files_have_the_published_names(preset, name):
    assert weights_name("sft", PRESETS[preset]) == name
    assert weights_name("lm", PRESETS[preset]) == name.replace("sft_vlm", "lm")


def test_a_file_is_half_precision_and_its_tied_head_takes_no_room(tmp_path):
    written(tmp_path / "w.pth")
    tensors = torch.load(tmp_path / "w.pth", weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    numbers = sum(tensor.numel() for name, tensor in tensors.items() if name != "lm_head.weight")
    assert (tmp_path / "w.pth").stat().st_size < 2 * numbers + 10_000


def test_saving_takes_nothing_from_the_model():
    trained = model()
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    for tensor in export_tensors(trained).values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "experts"])
def test_written_and_read_again_nothing_is_lost(tmp_path, config, ending):
    checkpoint = written(tmp_path / f"w{ending}", config, "pretrain")
    assert (checkpoint.config, checkpoint.stage, checkpoint.guessed) == (config, "pretrain", False)
    assert all(torch.equal(tensor, state(config)[name]) for name, tensor in checkpoint.tensors.items())
    load_into(model(config, seed=1), checkpoint)


def test_a_saved_file_is_read_by_torch_alone():
    program = f"""if True:
        import sys, torch
        tensors = torch.load({str(sighted())!r}, weights_only=True)
        assert type(tensors) is dict and all(type(tensor) is torch.Tensor for tensor in tensors.values())
        assert not any(name.startswith("minimind_v") for name in sys.modules)
        print(len(tensors), tensors["model.embed_tokens.weight"].dtype)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "41 torch.float16\n", done.stderr


def test_a_saved_safetensors_is_read_by_safetensors_alone(tmp_path):
    written(tmp_path / "w.safetensors")
    assert set(load_file(tmp_path / "w.safetensors")) == set(state())
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("value", [1e5, float("nan"), float("inf")])
def test_a_weight_that_half_precision_cannot_hold_is_not_saved(value):
    broken = model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.up_proj\.weight does not fit in float16"):
        export_tensors(broken)


# --- sizes ------------------------------------------------------------------------------------------------------------

ODD = [
    {"num_attention_heads": 2, "num_key_value_heads": 1},
    {"num_attention_heads": 4, "num_key_value_heads": 4},
    {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 100},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-6},
    {"num_attention_heads": 6, "num_key_value_heads": 2, "use_moe": True, "n_routed_experts": 3, "n_shared_experts": 2},
    {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_moe": True,
        "n_routed_experts": 1,
        "num_experts_per_tok": 1,
    },
]


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("sizes", ODD, ids=str)
def test_odd_sizes_are_read_from_the_description(tmp_path, sizes, ending):
    config = TextConfig(**{"hidden_size": 48, "num_hidden_layers": 1, "vocab_size": 30} | sizes)
    assert written(tmp_path / f"w{ending}", config).config == config


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_recognised_by_their_shapes_alone(tmp_path, preset):
    with torch.device("meta"):
        shapes = model(PRESETS[preset]).state_dict()
    inferred = infer_config(tmp_path / "w.pth", shapes)
    assert inferred == PRESETS[preset]
    assert name_preset(inferred) == preset


def test_the_shipped_base_is_of_the_demo_preset():
    checkpoint = read_checkpoint(BASE)
    assert (checkpoint.config, checkpoint.stage) == (PRESETS["demo"], "lm")
    assert set(checkpoint.tensors) | {"lm_head.weight"} == set(text_only(dict.fromkeys(published(4, FEED_FORWARD))))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", "not JSON — delete it"),
        ("\udcff", "not JSON — delete it"),
        ({"hidden_size": 64}, "hidden_size 64, not 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, not 2"),
        ({"vocab_size": 6400}, "vocab_size 6400, not 61"),
        ({"use_moe": True}, "use_moe True, not False"),
        ({"num_attention_heads": 3}, "must be an even multiple"),
        ({"num_attention_heads": 0}, "must be at least 1"),
        ({"num_key_value_heads": 4}, "heads have another width"),
        ({"hidden_size": "wide"}, "belongs to other weights"),
        ({"hidden_size": None}, "belongs to other weights"),
        ({"num_attention_heads": [4]}, "belongs to other weights"),
    ],
)
def test_a_description_of_other_weights_is_reported(tmp_path, description, message):
    written(tmp_path / "w.pth")
    text = description if isinstance(description, str) else json.dumps({"stage": "sft", "model": description})
    (tmp_path / "w.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WeightsError, match=message) as caught:
        read_checkpoint(tmp_path / "w.pth")
    assert "w.json" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[]", "5", "{}", '{"model": 5}', '{"name": "somebody else\'s"}', '{"model": {"new": 1}}']
)
def test_a_json_that_describes_no_sizes_changes_nothing(tmp_path, text):
    written(tmp_path / "w.pth")
    (tmp_path / "w.json").write_text(text)
    assert read_checkpoint(tmp_path / "w.pth").config == DENSE


def test_the_description_is_replaced_with_the_weights(tmp_path):
    written(tmp_path / "w.pth", DENSE, "pretrain")
    checkpoint = written(tmp_path / "w.pth", MOE, "sft")
    assert (checkpoint.config, checkpoint.stage) == (MOE, "sft")
    write_checkpoint(tmp_path / "w.pth", state(), DENSE, "sft")
    assert read_checkpoint(tmp_path / "w.pth").config == DENSE
