"""What is missing is told at once, before anything is loaded; and what can be done without it is done."""

from __future__ import annotations

import shutil

import pytest

from tests.cli.harness import ASSETS, BASE, in_forks, installed, run_mmv, tree
from tests.demo_folder import demo_folder

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
         ["in v", "in t", "d.jsonl", "no folder i ", "w.pth"]),
        ("eval", [TRAINED, EYE, WORDS, ROWS, PICTURES]),
        ("eval --model m.pth --vision-model v --tokenizer t --data d.jsonl --images i",
         ["m.pth", "in v", "in t", "d.jsonl", "no folder i "]),
        ("chat hello", [TRAINED, EYE, WORDS]),
        ("chat hello --image a.jpg --image b.jpg", [TRAINED, EYE, WORDS, "a.jpg", "b.jpg"]),
        ("convert --to hf", [TRAINED, EYE, WORDS]),
        ("convert --to gguf --model m.pth --tokenizer t", ["m.pth", "in t"]),
        ("data check d.jsonl --images i --against h.jsonl", ["d.jsonl", "no folder i ", WORDS, "h.jsonl"]),
        ("data stats d.jsonl --vision-model v", ["d.jsonl", WORDS, "in v"]),
        ("data preview d.jsonl --images i", ["d.jsonl", "no folder i ", WORDS]),
        ("data convert d.jsonl o.parquet --images i", ["d.jsonl", "no folder i "]),
        ("data split d.jsonl --out o --images i", ["d.jsonl", "no folder i "]),
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
    assert (lines[0], lines[1]) == ("error: 31 inputs are missing:", "  no image file at 0.jpg")
    assert lines[-1] == "  and 11 more"


@pytest.mark.parametrize("command", ["chat hello", "convert --to safetensors", "serve"])
def test_a_wrong_name_of_a_model_is_the_only_mistake(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# no weights")
    for name in ("README.md", "m.pth"):
        ended = run_mmv(*command.split(), "--model", name)
        assert ended.code == 1
        assert name in ended.error
        assert "mmv download" not in ended.error
        assert len(ended.err.splitlines()) == 1


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
    rows = run_mmv("data", "convert", tmp_path / "caption.jsonl", "o.jsonl").error
    assert f"(did you mean '{tmp_path / 'captions.jsonl'}'?)" in rows
    weights = run_mmv("chat", "hello", "--model", tmp_path / "cat.safetensors").error
    assert f"(did you mean '{tmp_path / 'cats.safetensors'}'?)" in weights


def test_a_name_that_is_not_alike_and_a_file_of_another_kind_are_not_offered(tmp_path):
    for name in ("back.pth", "back.json", "captions.txt"):
        (tmp_path / name).touch()
    for line in (("info", "nix.pth"), ("info", "nix.jsonl"), ("chat", "hello", "--model", "nix.pth"),
                 ("data", "check", "captions.jsonl"), ("info", "captions.jsonl")):  # fmt: skip
        ended = run_mmv(*line[:-1], tmp_path / line[-1])
        assert (ended.code, "did you mean" in ended.error) == (1, False), ended.error


def test_a_folder_of_images_that_the_user_names_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "pictures").mkdir(parents=True)
    (tmp_path / "own" / "rows.jsonl").touch()
    error = run_mmv("data", "convert", "own/rows.jsonl", "o.jsonl", "--images", "own/pics").error
    assert error == ("no folder own/pics (did you mean 'own/pictures'?) — give a folder, zip or tar with --images")
    assert "download" not in run_mmv("data", "convert", "own/row.jsonl", "o.jsonl").error


@pytest.mark.parametrize(
    ("name", "meaning"),
    [("rows.jsonl", "this is a data file, not weights — name weights here, and data with --data"),
     ("cats.json", "this describes the weights in cats.pth — give that file"),
     ("dog.jpg", "this is an image file, not weights — give it with --image")],
)  # fmt: skip
def test_a_file_that_is_no_weights_is_named_for_what_it_is(name, meaning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"conversations": []}')
    (tmp_path / "cats.json").write_text('{"model": {}}')
    (tmp_path / "cats.pth").touch()
    (tmp_path / "dog.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert run_mmv("chat", "hello", "--model", name).error == f"{name}: {meaning}"


def test_a_folder_with_one_file_of_weights_stands_for_it(tmp_path, monkeypatch, sighted):
    monkeypatch.chdir(tmp_path)
    for name in ("few", "more"):
        (tmp_path / name).mkdir()
        shutil.copy(sighted, tmp_path / name / "sft_vlm_128.pth")
        shutil.copy(sighted, tmp_path / name / "sft_vlm_128.safetensors")  # a copy is no other model
    shutil.copy(sighted, tmp_path / "more" / "sft_vlm_128_best.pth")
    assert "no vision model in" in run_mmv("chat", "hello", "--model", "few").error
    several = run_mmv("chat", "hello", "--model", "more").error
    assert several == "more has several weights — name one of more/sft_vlm_128.pth, more/sft_vlm_128_best.pth"


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A folder with `demo` inside, and rows of one's own."""
    monkeypatch.chdir(tmp_path)
    demo_folder(tmp_path / "demo")
    (tmp_path / "own.csv").write_text("image,question,answer\nstar.jpg,What colour is the star?,blue\n")
    return tmp_path / "demo"


def test_the_first_error_names_the_preset_of_the_weights_that_are_there(demo, monkeypatch):
    monkeypatch.chdir(demo)
    line = ("train", "sft", "--recipe", "small-data", "--data", "../own.csv", "--images", "pictures", "--out", "few")
    near = "no weights at out/sft_vlm_512.pth to start from — for out/sft_vlm_128.pth add --preset demo; "
    assert run_mmv(*line).error.startswith(near)
    assert run_mmv("train", "sft").error == run_mmv("plan", "sft").error
    assert "for out/pretrain_vlm_128.pth add --preset demo" in run_mmv("plan", "sft").error
    other = run_mmv("train", "sft", "--preset", "demo-3v").error
    assert (other.count("`mmv demo --generation 3v` makes it"), "download" in other) == (3, False), other


def test_what_goes_with_the_demos_model_is_found_where_that_is(demo):
    ended = run_mmv("eval", "--limit", 2, "--json")
    assert (ended.code, ended.json["data"]) == (0, "demo/dataset/sft_data.jsonl"), ended.err
    line = ("data", "check", "own.csv", "--images", "demo/pictures", "--json")
    hint = run_mmv(*line).error
    assert "or read rows as the demo's model does: --tokenizer demo/model --vision-model " in hint
    assert run_mmv(*line, *hint.partition("does: ")[2].split()).json["usable"] == 1


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
