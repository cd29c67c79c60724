"""Reading weights files of every layout that there is."""

import struct
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from minimind_v.core.errors import MissingInput, WeightsError
from minimind_v.core.formats.checkpoint import load_into, read_checkpoint
from tests.formats.made import DENSE, MOE, model, saved, state, text_only


def same(loaded, tensors):
    return loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_published_file_is_read_as_it_is(tmp_path):
    checkpoint = saved(tmp_path / "sft_vlm_32.pth", state())
    assert same(checkpoint.tensors, state())
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float16}
    assert checkpoint.ignored == []
    assert checkpoint.vision_width == 24


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.0.self_attn.mask", "model.freqs_cos", "model.freqs_sin", "freqs_cos", "pos_cis"),
        *("model.layers.1.self_attn.mask", "model.rotary.inv_freq"),
        *("vision_encoder.vision_model.embeddings.class_embedding", "vision_encoder.logit_scale"),
    ],
)
def test_buffers_of_old_versions_and_the_vision_encoder_are_left_out(tmp_path, name):
    odd = torch.full((4,), float("-inf"))  # a causal mask is full of those
    checkpoint = saved(tmp_path / "w.pth", {**state(), name: odd})
    assert checkpoint.ignored == [name]
    assert same(checkpoint.tensors, state())
    assert f"1 ignored ({name})" in str(load_into(model(), checkpoint))


@pytest.mark.parametrize("name", ["model.layers.0.attention_mask_weight", "model.masked", "vision_encoders.weight"])
def test_names_that_only_look_like_those_are_not_left_out(tmp_path, name):
    checkpoint = saved(tmp_path / "w.pth", {**state(), name: torch.ones(1)})
    with pytest.raises(WeightsError, match=f"1 unexpected .{name}."):
        load_into(model(), checkpoint)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {f"_orig_mod.module.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {"model": tensors, "epoch": 3},
        lambda tensors: {"state_dict": tensors, "optimizer": {"lr": 1e-3}},
        lambda tensors: {"model_state_dict": tensors, "epoch": 3, "losses": [1.5, 0.5]},
        lambda tensors: {"model": {"state_dict": tensors}, "counts": Counter("ab"), "seen": {1, 2}},
        lambda tensors: {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}},
        lambda tensors: {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()},
    ],
    ids=[
        "DDP",
        "compiled",
        "both",
        "both, turned",
        "wrapped",
        "state_dict",
        "model_state_dict",
        "twice",
        "wrapped DDP",
        "parameters",
    ],
)
def test_wrappings_are_undone(tmp_path, wrap):
    assert same(saved(tmp_path / "w.pth", wrap(state())).tensors, state())


def test_files_of_old_torch_versions_are_read(tmp_path):
    assert same(saved(tmp_path / "w.pth", state(), _use_new_zipfile_serialization=False).tensors, state())


def test_safetensors_are_read_without_a_description_too(tmp_path):
    apart = {name: tensor.clone() for name, tensor in state().items()}
    save_file(apart, tmp_path / "w.safetensors")
    checkpoint = read_checkpoint(tmp_path / "w.safetensors")
    assert same(checkpoint.tensors, state())
    assert checkpoint.guessed


def test_a_safetensors_file_that_begins_like_a_pickle_is_read(tmp_path):
    """Its first byte is that of its header's length."""
    apart = {name: tensor.clone() for name, tensor in state().items()}
    for padding in range(0, 256, 8):
        save_file(apart, tmp_path / "w.bin", {"note": "x" * padding})
        if (tmp_path / "w.bin").read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no header of such a length")
    assert same(read_checkpoint(tmp_path / "w.bin").tensors, state())


def test_what_a_file_is_decides_not_what_it_is_called(tmp_path):
    save_file({name: tensor.clone() for name, tensor in state().items()}, tmp_path / "w.pth")
    assert same(read_checkpoint(tmp_path / "w.pth").tensors, state())
    assert same(saved(tmp_path / "w.safetensors", state()).tensors, state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_any_floating_point_type_loads(tmp_path, dtype):
    checkpoint = saved(tmp_path / "w.pth", {name: tensor.to(dtype) for name, tensor in state().items()})
    loaded = model(seed=1)
    load_into(loaded, checkpoint)
    expected = state()["model.layers.0.mlp.up_proj.weight"].to(dtype).float()
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, expected)


def test_a_mixture_of_experts_is_read(tmp_path):
    checkpoint = saved(tmp_path / "w.pth", state(MOE))
    assert checkpoint.config.use_moe
    loaded = model(MOE, seed=1)
    load_into(loaded, checkpoint)
    assert torch.equal(loaded.model.layers[1].mlp.gate.weight.half(), state(MOE)["model.layers.1.mlp.gate.weight"])


@pytest.mark.parametrize(
    ("name", "tensors", "stage"),
    [
        ("lm_32.pth", text_only(state()), "lm"),
        ("llm_32.pth", text_only(state()), "lm"),
        ("pretrain_vlm_32.pth", state(), "pretrain"),
        ("sft_vlm_32.pth", state(), "sft"),
        ("mine.pth", state(), "unknown"),
    ],
)
def test_the_stage_is_read_from_the_file(tmp_path, name, tensors, stage):
    assert saved(tmp_path / name, tensors).stage == stage


def test_parameters_count_the_tied_head_once(tmp_path):
    checkpoint = saved(tmp_path / "w.pth", state())
    assert checkpoint.parameters == sum(parameter.numel() for parameter in model().parameters())


# --- numbers that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_reported_with_its_tensor(tmp_path, value):
    tensors = state()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    with pytest.raises(WeightsError, match=r"w\.pth: model\.layers\.1\.mlp\.up_proj\.weight contains NaN or infinite"):
        saved(tmp_path / "w.pth", tensors)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(32, 32, dtype=torch.int8),
        torch.ones(32, 32, dtype=torch.complex64),
        torch.eye(32).to_sparse(),
        torch.empty(32, 32, device="meta"),
    ],
    ids=["int8", "complex", "sparse", "meta"],
)
def test_tensors_of_another_kind_are_refused(tmp_path, tensor):
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(WeightsError, match=f"{name} is not plain floating point"):
        saved(tmp_path / "w.pth", {**state(), name: tensor})


# --- files that are not there, or something else ----------------------------------------------------------------------


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MissingInput, match=r"no weights at .*w\.pth"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_folder(tmp_path):
    with pytest.raises(WeightsError, match="a folder, not a weights file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html></html>", r"HTML page.*/resolve/"),
        (b"\n\n <html><body>Not found</body></html>", "HTML page"),
        (b"\xef\xbb\xbf<!doctype html>", "HTML page"),
        (b"<!-- saved --><html>", "HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 52\n", "git-lfs pointer.*git lfs pull"),
        (b"Entry not found", "neither a torch nor a safetensors file"),
        (b'{"error": "Repository not found"}', "neither a torch nor a safetensors file"),
        (bytes(2000), "neither a torch nor a safetensors file"),
        (struct.pack("<Q", 2**60) + b"{" + bytes(50), "truncated or damaged"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
        (b"\x80", "damaged"),
    ],
)
def test_other_files_given_as_weights(tmp_path, content, message):
    path = tmp_path / "lm_512.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"lm_512\.pth: .*{message}") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"a": 1}, 5, "text", None, torch.ones(3), {1: torch.ones(3)}, {"model": {"a": 1}}, {"a": [torch.ones(3)]}],
    ids=repr,
)
def test_a_torch_file_of_something_else(tmp_path, content):
    with pytest.raises(WeightsError, match=r"contains no state_dict \(names and tensors\)"):
        saved(tmp_path / "w.pth", content)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"weight": torch.ones(3)}, {"model": torch.ones(3)}], ids=repr)
def test_a_state_dict_of_another_model(tmp_path, content):
    with pytest.raises(WeightsError, match="not the weights of a MiniMind model"):
        saved(tmp_path / "w.pth", content)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (61,)),
        ("model.embed_tokens.weight", (0, 0)),
        ("model.layers.0.self_attn.k_proj.weight", ()),
        ("model.layers.0.self_attn.k_proj.weight", (0, 32)),
        ("model.layers.0.self_attn.k_proj.weight", (3, 32)),
        ("model.layers.0.mlp.gate_proj.weight", ()),
        ("model.layers.5.mlp.gate_proj.weight", (48, 32)),  # layers 2 to 4 are missing
        ("model.layers.99999999.mlp.gate_proj.weight", (48, 32)),
        (f"model.layers.{'9' * 5000}.mlp.gate_proj.weight", (48, 32)),
        ("model.layers.0.mlp.gate.weight", (4, 32)),  # a router without experts
    ],
)
def test_shapes_that_no_model_has(tmp_path, name, shape):
    head = {"lm_head.weight": torch.zeros(shape)} if "embed_tokens" in name else {}
    with pytest.raises(WeightsError, match="not the weights of a MiniMind model"):
        saved(tmp_path / "w.pth", {**state(), name: torch.zeros(shape), **head})


def test_sizes_are_those_of_the_model(tmp_path):
    checkpoint = saved(tmp_path / "w.pth", state(DENSE))
    assert checkpoint.config == DENSE


def test_llama_cpps_file_needs_the_one_beside_it(tmp_path):
    path = tmp_path / "lm_512.pth"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    with pytest.raises(MissingInput, match=r"mmproj\.gguf is missing"):
        read_checkpoint(path)
