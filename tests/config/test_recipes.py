"""Defaults are the published ones."""

from pathlib import Path

import pytest
import torch

from minimind_v.core.config.freeze import FREEZE_POLICIES
from minimind_v.core.config.load import build_config
from minimind_v.core.config.presets import PRESETS, weights_name
from minimind_v.core.config.schema import TextConfig
from minimind_v.core.errors import UsageError
from minimind_v.core.model.vision.encoder import VisionSpec
from minimind_v.core.model.vlm import VLM


@pytest.mark.parametrize(
    ("stage", "freeze", "epochs", "batch", "length", "lr"),
    [("pretrain", "projector+last", 4, 16, 640, 4e-4), ("sft", "all", 2, 4, 1536, 1e-6)],
)
def test_a_recipe_is_the_published_one(stage, freeze, epochs, batch, length, lr):
    config = build_config(stage)
    assert (config.freeze, config.epochs, config.lr) == (freeze, epochs, lr)
    assert (config.data.batch_size, config.data.max_length) == (batch, length)
    assert (config.weight_decay, config.grad_clip, config.accumulate) == (0.01, 1.0, 1)
    assert config.model == PRESETS["small"]
    assert config.stage == stage


@pytest.mark.parametrize(("stage", "before"), [("pretrain", "lm_512.pth"), ("sft", "pretrain_vlm_512.pth")])
def test_a_stage_starts_from_the_file_that_the_one_before_leaves(stage, before):
    config = build_config(stage)
    assert config.init == Path("out") / before
    assert config.data.file == Path("dataset") / f"{stage}_data.jsonl"
    assert config.data.images == Path("dataset") / f"{stage}_images.zip"
    assert config.vision_model == Path("model/vision_model/clip-vit-base-patch16")
    assert config.data.tokenizer == Path("model")
    assert config.out == Path("out")


@pytest.mark.parametrize("preset", ["3v", "3v-moe"])
def test_the_recipes_of_minimind_3v_are_the_published_ones(preset):
    moe = "_moe" if preset == "3v-moe" else ""
    for stage, freeze, epochs, batch, length, lr in (
        ("pretrain", "projector", 2, 16, 450, 4e-4),
        ("sft", "projector+ends", 2, 4, 768, 5e-6),
    ):
        config = build_config(stage, options={"preset": preset})
        assert (config.freeze, config.epochs, config.lr) == (freeze, epochs, lr)
        assert (config.data.batch_size, config.data.max_length) == (batch, length)
        assert (config.projector, config.data.layout) == ("mlp", "chatml-think")
        assert config.init == Path(f"out/llm_768{moe}.pth"), "sft starts from the language model as well"
        assert (config.data.file, config.data.images) == (Path(f"dataset/{stage}_i2t.parquet"), None)
        assert config.vision_model == Path("model/vision_model/siglip2-base-p32-256-ve")
        assert config.data.tokenizer == Path("model/minimind-3v")


@pytest.mark.parametrize(("preset", "parameters"), [("3v", 65_094_912), ("3v-moe", 199_599_360)])
def test_a_preset_of_minimind_3v_has_the_published_sizes(preset, parameters):
    config = PRESETS[preset]
    assert (config.hidden_size, config.num_hidden_layers, config.use_moe) == (768, 8, preset == "3v-moe")
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (8, 4, 2432)
    assert (config.vocab_size, config.rms_norm_eps, config.rope_theta) == (6400, 1e-6, 1e6)
    spec = VisionSpec(image_size=256, patch_size=32, width=768)
    with torch.device("meta"):
        model = VLM(config, spec, placeholder_id=12, projector="mlp")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_fine_tuning_on_little_data_trains_everything_in_both_generations():
    for preset in ("small", "3v"):
        config = build_config("sft", options={"preset": preset, "recipe": "small-data"})
        assert (config.freeze, config.init) == ("all", Path("out") / weights_name("sft", PRESETS[preset]))


def test_the_policies_are_the_published_ones():
    assert list(FREEZE_POLICIES) == ["projector", "projector+last", "projector+ends", "attention", "all"]


@pytest.mark.parametrize(
    ("preset", "hidden", "layers", "moe", "millions"),
    [("small", 512, 8, False, 26.22), ("base", 768, 16, False, 104.62), ("moe", 640, 8, True, 145.52)],
)
def test_a_preset_has_the_published_sizes(preset, hidden, layers, moe, millions):
    config = PRESETS[preset]
    assert (config.hidden_size, config.num_hidden_layers, config.use_moe) == (hidden, layers, moe)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 2)
    assert (config.vocab_size, config.rms_norm_eps, config.rope_theta) == (6400, 1e-5, 1e6)
    assert config.max_position_embeddings == 32768
    if moe:
        assert (config.n_routed_experts, config.n_shared_experts, config.num_experts_per_tok) == (4, 1, 2)
        assert config.aux_loss_alpha == 0.1
    with torch.device("meta"):
        model = VLM(config, VisionSpec(image_size=224, patch_size=16, width=768), placeholder_id=34)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(("hidden", "inner"), [(512, 1408), (768, 2048), (640, 1728), (128, 384), (64, 192), (8, 64)])
def test_the_inner_size_is_rounded_up_to_64(hidden, inner):
    assert TextConfig(hidden_size=hidden, num_attention_heads=4).intermediate_size == inner


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 0}, "model.hidden_size must be at least 1, not 0"),
        ({"num_hidden_layers": -1}, "model.num_hidden_layers must be at least 1"),
        ({"vocab_size": 0}, "model.vocab_size must be at least 1"),
        ({"num_attention_heads": 0}, "model.num_attention_heads must be at least 1"),
        ({"num_attention_heads": 7}, "512 must be an even multiple of model.num_attention_heads 7"),
        ({"num_attention_heads": 512}, "even multiple"),  # heads of one number cannot turn
        ({"num_key_value_heads": 3}, "model.num_attention_heads 8 must be a multiple of model.num_key_value_heads 3"),
        ({"intermediate_size": -1}, "model.intermediate_size must be at least 0"),
        ({"rms_norm_eps": 0.0}, "model.rms_norm_eps must be between 0 and 1"),
        ({"rope_theta": float("nan")}, "model.rope_theta must be between 0 and"),
        ({"use_moe": True, "num_experts_per_tok": 5}, "model.num_experts_per_tok must be between 1 and"),
        ({"use_moe": True, "n_routed_experts": 0}, "model.num_experts_per_tok must be between 1 and"),
        ({"use_moe": True, "n_shared_experts": -1}, "model.n_shared_experts must be at least 0"),
        ({"use_moe": True, "aux_loss_alpha": float("nan")}, "model.aux_loss_alpha must be between 0 and"),
        ({"hidden_size": 10**12}, "model.hidden_size must be at most 65,536, not 1000000000000"),
        ({"num_hidden_layers": 10**9}, "model.num_hidden_layers must be at most 1,000"),
        ({"vocab_size": 10**10}, "model.vocab_size must be at most 1,048,576"),
        ({"num_attention_heads": 10**7}, "model.num_attention_heads must be at most 4,096"),
        ({"intermediate_size": 10**9}, "model.intermediate_size must be at most 1,048,576"),
        ({"max_position_embeddings": 10**12}, "model.max_position_embeddings must be at most 16,777,216"),
        ({"rope_theta": float("inf")}, "model.rope_theta must be between 0 and"),
        ({"use_moe": True, "n_routed_experts": 10**6}, "model.n_routed_experts must be at most 1,024"),
        ({"hidden_size": 65_536}, "makes 361,231,351,808 parameters; the maximum is 2,000,000,000"),
        ({"hidden_size": "512"}, "model.hidden_size must be a whole number, not '512'"),
        ({"hidden_size": 512.0}, "model.hidden_size must be a whole number, not 512.0"),
        ({"num_hidden_layers": True}, "model.num_hidden_layers must be a whole number, not True"),
        ({"vocab_size": None}, "model.vocab_size must be a whole number, not None"),
        ({"rope_theta": [1e6]}, "model.rope_theta must be a number"),
        ({"use_moe": 1}, "model.use_moe must be true or false, not 1"),
    ],
)
def test_sizes_that_make_no_model_are_refused_by_their_key(sizes, message):
    with pytest.raises(UsageError) as caught:
        TextConfig(**sizes)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_the_parameters_of_sizes_are_those_of_the_model(name):
    with torch.device("meta"):
        model = VLM(PRESETS[name], VisionSpec(image_size=224, patch_size=16, width=768), placeholder_id=34)
    projector = sum(parameter.numel() for parameter in model.vision_proj.parameters())
    assert PRESETS[name].parameters + projector == sum(parameter.numel() for parameter in model.parameters())


def test_files_are_named_after_stage_and_size():
    assert weights_name("pretrain", PRESETS["small"]) == "pretrain_vlm_512.pth"
    assert weights_name("sft", PRESETS["moe"]) == "sft_vlm_640_moe.pth"
    assert weights_name("lm", PRESETS["base"]) == "lm_768.pth"
    assert weights_name("lm", PRESETS["3v-moe"]) == "llm_768_moe.pth"
    assert weights_name("sft", PRESETS["3v"]) == weights_name("sft", PRESETS["base"]) == "sft_vlm_768.pth"
