"""`mmv convert` between file formats."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.hub.sources import find_weights
from tests.cli.harness import SIGHT, run_mmv, tree


@pytest.fixture
def source(sighted, tmp_path):
    """A copy of the weights, with their description, in an otherwise empty folder."""
    for ending in (".pth", ".json"):
        shutil.copy(sighted.with_suffix(ending), tmp_path / f"sft_vlm_128{ending}")
    return tmp_path / "sft_vlm_128.pth"


def test_there_and_back_again_gives_the_same_bits(source, tmp_path):
    first = run_mmv("convert", "--to", "safetensors", "--model", source)
    assert first.code == 0, first.err
    assert "largest difference 0" in first.err
    back = tmp_path / "back.pth"
    assert run_mmv("convert", "--to", "pth", "--model", source.with_suffix(".safetensors"), "--out", back).code == 0
    before, after = (torch.load(path, weights_only=True) for path in (source, back))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )
    assert read_checkpoint(back).config == read_checkpoint(source).config
    assert read_checkpoint(back).stage == "sft"


def test_the_converted_file_answers_as_its_source(source):
    assert run_mmv("convert", "--to", "safetensors", "--model", source).code == 0
    answers = [
        run_mmv("chat", "What colour is the star?", "--model", path, *SIGHT, "--greedy", "--max-new-tokens", 8).out
        for path in (source, source.with_suffix(".safetensors"))
    ]
    assert answers[0] == answers[1] != "\n"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_type_can_be_chosen(source, tmp_path, dtype):
    out = tmp_path / "other.safetensors"
    ended = run_mmv("convert", "--to", "safetensors", "--model", source, "--dtype", dtype, "--out", out)
    assert ended.code == 0, ended.err
    assert {tensor.dtype for tensor in read_checkpoint(out).tensors.values()} == {getattr(torch, dtype)}
    assert ("largest difference 0\n" in ended.err) == (dtype != "bfloat16")


def test_a_value_too_large_for_the_type_is_refused(source, tmp_path):
    state = torch.load(source, weights_only=True)
    state["model.norm.weight"] = state["model.norm.weight"].float() + 1e5
    torch.save(state, tmp_path / "large.pth")
    out = tmp_path / "half.safetensors"
    ended = run_mmv(
        "convert", "--to", "safetensors", "--model", tmp_path / "large.pth", "--dtype", "float16", "--out", out
    )
    assert ended.code == 1
    assert "model.norm.weight does not fit in float16" in ended.error
    assert not out.exists()


def test_tensors_that_are_views_can_be_written(source, tmp_path):
    state = torch.load(source, weights_only=True)
    name = "model.layers.0.self_attn.o_proj.weight"
    state[name] = state[name].t()
    torch.save(state, tmp_path / "turned.pth")
    assert run_mmv("convert", "--to", "safetensors", "--model", tmp_path / "turned.pth").code == 0
    assert torch.equal(read_checkpoint(tmp_path / "turned.safetensors").tensors[name], state[name])


def test_nothing_is_replaced_unasked(source, tmp_path):
    target = tmp_path / "other.safetensors"
    target.write_text("mine")
    args = ("convert", "--to", "safetensors", "--model", source, "--out", target)
    refused = run_mmv(*args)
    assert refused.code == 2
    assert f"{target} already exists — add --overwrite" in refused.error
    assert target.read_text() == "mine"
    assert run_mmv(*args, "--overwrite").code == 0
    assert read_checkpoint(target).stage == "sft"


def test_a_json_of_somebody_else_is_not_replaced_either(source, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused = run_mmv("convert", "--to", "pth", "--model", source, "--out", tmp_path / "config.pth")
    assert refused.code == 2
    assert f"{tmp_path / 'config.json'} already exists" in refused.error
    assert (tmp_path / "config.json").read_text() == "{}"
    assert not (tmp_path / "config.pth").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "pth"], "is the source"),
        (["--to", "pth", "--overwrite"], "is the source"),
        (["--to", "safetensors", "--out", "x.pth"], "--out x.pth must end with .safetensors"),
        (["--to", "safetensors", "--out", "x"], "--out x must end with .safetensors"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(source, tmp_path, args, message):
    before = source.read_bytes()
    refused = run_mmv("convert", "--model", source, *args)
    assert refused.code == 2
    assert message in refused.error
    assert source.read_bytes() == before
    assert tree(tmp_path) == ["sft_vlm_128.json", "sft_vlm_128.pth"]


@pytest.mark.parametrize("to", ["safetensors", "pth"])
@pytest.mark.parametrize("damage", ["cut", "page", "empty", "gone"])
def test_a_damaged_source_leaves_nothing_behind(source, tmp_path, to, damage):
    broken = tmp_path / "broken.bin"
    content = {"cut": source.read_bytes()[:100_000], "page": b"<!doctype html>", "empty": b"", "gone": None}[damage]
    if content is not None:
        broken.write_bytes(content)
    before = tree(tmp_path)
    refused = run_mmv("convert", "--to", to, "--model", broken, "--out", tmp_path / f"out.{to}")
    assert refused.code == 1
    assert str(broken) in refused.error
    assert tree(tmp_path) == before


def test_a_folder_that_does_not_exist_is_made_and_a_file_is_none(source, tmp_path):
    assert run_mmv("convert", "--to", "pth", "--model", source, "--out", tmp_path / "new" / "w.pth").code == 0
    refused = run_mmv("convert", "--to", "pth", "--model", source, "--out", source / "w.pth")
    assert refused.code == 1
    assert "w.pth: cannot be written (" in refused.error


def test_unknown_formats_and_types_are_usage(source):
    for args in (["--to", "onnx"], ["--to", "pth", "--dtype", "int4"], []):
        assert run_mmv("convert", "--model", source, *args).code == 2


def test_without_a_model_the_latest_of_the_standard_folder_is_taken(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = run_mmv("convert", "--to", "safetensors")
    assert refused.code == 1
    assert "no trained weights in out" in refused.error
    (tmp_path / "out").mkdir()
    shutil.copy(source, tmp_path / "out")
    assert run_mmv("convert", "--to", "safetensors").code == 0
    assert (tmp_path / "out" / "sft_vlm_128.safetensors").exists()
    again = run_mmv("convert", "--to", "safetensors")
    assert (again.code, "already exists — add --overwrite" in again.error) == (2, True), "the copy is no newer model"
    assert run_mmv("convert", "--to", "safetensors", "--overwrite").code == 0
    os.utime("out/sft_vlm_128.safetensors", (2**31, 2**31))
    assert find_weights(Path("out")).name == "sft_vlm_128.pth"
