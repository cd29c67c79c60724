"""The commands with a model of minimind-3v: train, info, eval, chat, convert, doctor, runs."""

import json
import shutil

import pytest
import torch

from minimind_v.core.export.prove import verify_gguf
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.paths import TOKENIZER_3V_DIR, VISION_3V_DIR
from tests.cli.harness import run_mmv, tiny_data
from tests.formats.made3v import SIZES, tiny_3v

SETS = [word for name, value in SIZES.items() for word in ("--set", f"model.{name}={value}")]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with the standard folders of minimind-3v and a text-only base."""
    monkeypatch.chdir(tmp_path)
    weights, tower, words = tiny_3v(tmp_path / "parts", name="whole.pth")
    base = {name: tensor for name, tensor in torch.load(weights).items() if not name.startswith("vision_proj")}
    (tmp_path / "out").mkdir()
    torch.save(base, tmp_path / "out" / "llm_48.pth")
    shutil.copytree(tower, VISION_3V_DIR)
    shutil.copytree(words, TOKENIZER_3V_DIR)
    return tmp_path


def train(stage="sft", *more, preset="3v"):
    """A short run; tower, tokenizer and base are those of the standard folders."""
    data = ("--data", tiny_data().data(stage), "--images", tiny_data().images(stage))
    few = ("--device", "cpu", "--workers", 0, "--max-steps", 3, "--log-every", 1, "--seed", 1, "--max-length", 300)
    return run_mmv("train", stage, "--preset", preset, *SETS, *data, *few, *more)


def test_a_model_is_fine_tuned_from_the_language_model_and_used(project):
    ended = train()
    assert ended.code == 0, ended.err
    weights = project / "out" / "sft_vlm_48.pth"
    described = run_mmv("info", weights, "--json").json
    assert (described["stage"], described["projector"], described["layout"]) == ("sft", "mlp", "chatml-think")
    assert (described["qk_norm"], described["generation"]) == (True, "minimind-3v (2026)")
    trained, base = read_checkpoint(weights).tensors, read_checkpoint(project / "out" / "llm_48.pth").tensors
    changed = {name for name in base if not torch.equal(trained[name], base[name])}
    assert all(name.startswith(("model.layers.0.", "model.layers.2.")) for name in changed), "projector+ends"
    assert any(name.startswith("model.layers.0.") for name in changed)
    data = ("--data", tiny_data().data("sft"), "--images", tiny_data().images("sft"), "--limit", 4, "--device", "cpu")
    assert run_mmv("eval", "--model", weights, *data, "--json").json["rows"] == 4
    assert "answer" in run_mmv("chat", "What is it?", "--image", tiny_data().picture(), "--model", weights, "--greedy",
                            "--max-new-tokens", 4, "--device", "cpu", "--json").json  # fmt: skip
    newest = run_mmv("runs", "out", "--json").json["runs"][0]
    assert (newest["name"], newest["stage"]) == ("sft_vlm_48", "sft")


def test_pretraining_trains_the_projector_alone(project):
    assert train("pretrain", "--max-steps", 1).code == 0
    weights = read_checkpoint(project / "out" / "pretrain_vlm_48.pth")
    base = read_checkpoint(project / "out" / "llm_48.pth").tensors
    assert all(torch.equal(weights.tensors[name], base[name]) for name in base)
    assert train("sft", "--init", "out/pretrain_vlm_48.pth", "--max-steps", 1).code == 0


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_are_converted_and_back(project, ending):
    weights, target, again = project / "parts" / "whole.pth", project / f"w.{ending}", project / "again.pth"
    assert run_mmv("convert", "--to", ending, "--model", weights, "--out", target).code == 0
    assert run_mmv("convert", "--to", "pth", "--model", target, "--out", again).code == 0
    before, after = torch.load(weights), torch.load(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_checkpoint(again).config == read_checkpoint(weights).config


@pytest.mark.long
def test_a_folder_for_transformers_is_described_and_evaluated(project):
    model = ("--model", "parts/whole.pth", "--vision-model", "parts/siglip", "--tokenizer", "parts/words")
    ended = run_mmv("convert", "--to", "hf", *model, "--out", "export")
    assert ended.code == 0, ended.err
    described = run_mmv("info", "export", "--json").json
    assert (described["kind"], described["tokens_per_image"], described["projector"]) == ("hf", 16, "mlp")
    assert "torchvision" in (project / "export" / "README.md").read_text()
    data = ("--data", tiny_data().data("sft"), "--images", tiny_data().images("sft"), "--limit", 4, "--device", "cpu")
    ours, theirs = (run_mmv("eval", *words, *data, "--json").json for words in (model, ("--model", "export")))
    for key in ("model", "seconds"):
        del ours[key], theirs[key]
    assert ours == theirs


@pytest.mark.parametrize("check", ["--verify", "--no-verify"])
def test_gguf_holds_the_language_model_and_says_what_is_left_out(project, check, monkeypatch):
    monkeypatch.setattr(verify_gguf, "_llama_is_installed", lambda: False)
    model = ("--model", "parts/whole.pth", "--vision-model", "parts/siglip", "--tokenizer", "parts/words")
    ended = run_mmv("convert", "--to", "gguf", *model, "--quantize", "f32", "--out", "export", check)
    assert ended.code == 0, ended.err
    assert "not in the export: llama.cpp has no form for siglip_vision_model" in " ".join(ended.out.split())
    assert sorted(path.name for path in (project / "export").iterdir()) == [
        "Modelfile", "mmv_export.json", "model.gguf",
    ]  # fmt: skip
    described = run_mmv("info", "export", "--json").json
    assert (described["architecture"], described["qwen3.block_count"]) == ("qwen3", 3)
    refused = run_mmv("chat", "Hi", "--model", "export")
    assert "export: the language model alone, which cannot encode images" in refused.error
    assert run_mmv("convert", "--to", "pth", "--model", "export", "--out", "out/llm_back.pth").code == 0
    assert train("sft", "--init", "export", "--max-steps", 1).code == 0
    whole, back = torch.load("parts/whole.pth"), torch.load("out/llm_back.pth")
    assert whole.keys() - back.keys() == {name for name in whole if name.startswith("vision_proj.")}
    assert all(torch.equal(whole[name].float(), tensor) for name, tensor in back.items())


def test_what_is_missing_is_named_with_the_command_of_its_generation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run_mmv("train", "sft", "--preset", "3v")
    assert ended.code == 1
    for command in ("mmv download clip --preset 3v", "mmv download tokenizer --preset 3v", "mmv download dataset",
                    "mmv download lm --preset 3v"):  # fmt: skip
        assert f"`{command}`" in ended.err
    assert "mmv train pretrain" not in ended.err, "fine-tuning starts from the language model"


def test_doctor_reports_the_files_of_a_preset(project):
    report = run_mmv("doctor", "--preset", "3v", "--json").json
    assert report["vision model"] == f"found, {VISION_3V_DIR / 'config.json'}"
    assert report["tokenizer"] == f"found, {TOKENIZER_3V_DIR / 'tokenizer.json'}"
    assert "out/llm_768.pth — `mmv download lm --preset 3v`" in report["language model"]
    assert "train pretrain --preset 3v" in report["pretrained weights"]
    assert run_mmv("doctor", "--preset", "small", "--json").json == run_mmv("doctor", "--json").json
    assert run_mmv("doctor", "--preset", "4v").code == 2


def test_lists_name_both_presets_where_only_a_name_is_known(project):
    for name in ("sft_vlm_768.pth", "llm_768.pth", "lm_512.pth"):
        shutil.copy(project / "parts" / "whole.pth", project / "out" / name)
    entries = run_mmv("runs", "out", "--json").json
    models = {entry["name"]: entry["model"] for entry in entries["runs"]}
    assert models["sft_vlm_768.pth"] == models["llm_768.pth"] == "base or 3v"
    assert models["lm_512.pth"] == "small"
    assert json.dumps(entries)
