"""What is missing is told at once, before anything is loaded; and what can be done without it is done."""

from __future__ import annotations

import shutil

import pytest

from tests.cli.harness import ASSETS, BASE, in_forks, installed, run_mmv, tree

EYE, WORDS, ROWS = "mmv download clip", "mmv download tokenizer", "mmv download dataset"
PICTURES, TRAINED = "no image files at", "no trained weights in out"


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("train pretrain", [EYE, WORDS, ROWS, PICTURES, "mmv download lm"]),
        ("train sft", [EYE, WORDS, ROWS, PICTURES, "`mmv train pretrain`"]),
        ("train sft --gpus 2 --device cpu", [EYE, WORDS, ROWS, PICTURES, "`mmv train pretrain`"]),
        ("plan sft", [EYE, WORDS, ROWS, PICTURES]),
        ("train sft --vision-model v --tokenizer t --data d.jsonl --images i --init w.pth",
         ["in v", "in t", "d.jsonl", "at i ", "w.pth"]),
        ("eval", [TRAINED, EYE, WORDS, ROWS, PICTURES]),
        ("eval --model m.pth --vision-model v --tokenizer t --data d.jsonl --images i",
         ["m.pth", "in v", "in t", "d.jsonl", "at i "]),
        ("chat hello", [TRAINED, EYE, WORDS]),
        ("chat hello --image a.jpg --image b.jpg", [TRAINED, EYE, WORDS, "a.jpg", "b.jpg"]),
        ("convert --to hf", [TRAINED, EYE, WORDS]),
        ("convert --to gguf --model m.pth --tokenizer t", ["m.pth", EYE, "in t"]),
        ("data check d.jsonl --images i --against h.jsonl", ["d.jsonl", "at i ", WORDS, "h.jsonl"]),
        ("data stats d.jsonl --vision-model v", ["d.jsonl", WORDS, "in v"]),
        ("data preview d.jsonl --images i", ["d.jsonl", "at i ", WORDS]),
        ("data convert d.jsonl o.parquet --images i", ["d.jsonl", "at i "]),
        ("data split d.jsonl --out o --images i", ["d.jsonl", "at i "]),
    ],
)  # fmt: skip
def test_all_missing_inputs_are_reported_at_once(line, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run_mmv(*line.split())
    assert ended.code == 1
    assert f"{len(missing)} inputs are missing: " in ended.error
    assert all(name in ended.error for name in missing), ended.error
    assert len(ended.err.partition("error: ")[2].splitlines()) == 1 + len(missing)
    assert tree(tmp_path) == []


def test_a_long_list_of_missing_inputs_ends_with_their_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [word for number in range(30) for word in ("--image", f"{number}.jpg")]
    lines = run_mmv("chat", "hello", *images, "--model", "m.pth").err.splitlines()
    assert len(lines) == 22
    assert (lines[0], lines[1]) == ("error: 33 inputs are missing:", "  no image file at 0.jpg")
    assert lines[-1] == "  and 13 more"


def test_what_is_there_is_not_missed(tmp_path, monkeypatch, tiny_data, sighted):
    """Weights that are there, and nothing else: what goes with them is found when they are read."""
    monkeypatch.chdir(tmp_path)
    error = run_mmv("eval", "--model", sighted, "--data", "none.jsonl").error
    assert error.startswith("3 inputs are missing: no data file none.jsonl")
    assert (EYE in error, WORDS in error) == (True, True)
    error = run_mmv("convert", "--to", "hf", "--model", sighted).error
    assert (EYE in error, WORDS in error) == (True, True)
    error = run_mmv("data", "check", tiny_data.data("sft"), "--tokenizer", tmp_path).error
    assert error.startswith("no tokenizer in")


WRONG = ("train sft", "eval", "chat hello --image a.jpg", "convert --to hf", "chat hello --temperature -1",
         "chat hello --top-p 2", "chat <image>? --greedy", "bench --preset smal", "train sft --overwrite --resume",
         "convert --to pth --model w.pth --out x.bin")  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "w.pth").touch()
    return in_forks(*WRONG, cwd=folder)


@pytest.mark.parametrize("line", WRONG)
def test_errors_are_reported_before_torch_is_imported(outcomes, line):
    ended, modules = outcomes[line]
    assert ended.code in (1, 2), ended.err
    assert ended.out == ""
    assert "torch" not in modules


def test_a_name_that_is_nearly_right_is_offered(tmp_path):
    (tmp_path / "captions.jsonl").touch()
    shutil.copy(BASE, tmp_path / "cats.safetensors")
    assert "(did you mean 'captions.jsonl'?)" in run_mmv("data", "convert", tmp_path / "caption.jsonl", "o.jsonl").error
    assert (
        "(did you mean 'cats.safetensors'?)" in run_mmv("chat", "hello", "--model", tmp_path / "cat.safetensors").error
    )


# --- rows without a vision model --------------------------------------------------------------------------------------

SIZE = "224 × 224, 196 tokens per image"


@pytest.fixture
def no_vision(tiny_data, tmp_path, monkeypatch):
    """Runs a command over rows where there is a tokenizer and no vision model."""
    monkeypatch.chdir(tmp_path)
    return lambda command, *more: run_mmv("data", command, tiny_data.data("sft"), "--tokenizer", ASSETS, *more)


def test_check_needs_no_vision_model(no_vision, tiny_data, tmp_path):
    ended = no_vision("check", "--json")
    assert SIZE in ended.err
    assert ended.json["usable"] == 40
    by_hand = installed("data", "check", tiny_data.data("sft"), "--tokenizer", ASSETS, "--workers", 1, cwd=tmp_path)
    assert (by_hand.code, SIZE in by_hand.err) == (0, True), by_hand.err


def test_stats_need_no_vision_model(no_vision):
    ended = no_vision("stats", "--json", "--limit", 8)
    assert SIZE in ended.err
    assert (ended.json["tokens_per_image"], ended.json["tokens"]["images"]["min"]) == (196, 196)
    assert ended.json["time"]["seconds"] > 0


def test_preview_needs_no_vision_model(no_vision):
    ended = no_vision("preview", "--rows", 1, "--json")
    assert SIZE in ended.err
    assert ended.json["rows"][0]["image_tokens"] == 196


@pytest.mark.parametrize("command", ["check", "stats", "preview"])
def test_a_vision_model_that_is_named_must_be_there(no_vision, command):
    ended = no_vision(command, "--vision-model", "elsewhere")
    assert (ended.code, "no vision model in elsewhere" in ended.error) == (1, True)
    assert SIZE not in ended.err


def test_a_vision_model_that_is_there_decides(no_vision, tmp_path):
    folder = tmp_path / "model" / "vision_model" / "clip-vit-base-patch16"
    folder.mkdir(parents=True)
    shutil.copy(ASSETS / "vision" / "config.json", folder)
    ended = no_vision("preview", "--rows", 1, "--json")
    assert SIZE not in ended.err
    assert ended.json["rows"][0]["image_tokens"] == 64
