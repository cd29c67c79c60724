"""`--model` alone is enough: the vision model and the tokenizer that a run had are found again, and no others."""

import json
import random
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from minimind_v.core.demo.dataset import write_sft
from minimind_v.core.paths import TOKENIZER_DIR, VISION_DIR
from tests.cli.harness import ASSETS, BASE, EYE, run_mmv

WEIGHTS = "runs/sft_vlm_128"
NAMED = ("--vision-model", "eyes/small", "--tokenizer", "words")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A project whose run had its vision model and its tokenizer where no standard folder is, by relative paths."""
    folder = tmp_path_factory.mktemp("template") / "project"
    shutil.copytree(EYE, folder / "eyes" / "small")
    (folder / "words").mkdir()
    shutil.copy(ASSETS / "tokenizer.json", folder / "words")
    write_sft(folder / "rows", random.Random(5), 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trained = run_mmv(
            *("train", "sft", "--preset", "demo", "--data", "rows/sft_data.jsonl", *NAMED, "--init", "none"),
            *("--out", "runs", "--max-steps", 2, "--val-every", 1, "--device", "cpu", "--workers", 0),
        )
    assert trained.code == 0, trained.err
    return folder


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    return folder


def ask(model, *args):
    return run_mmv("chat", "--model", model, "--greedy", "--max-new-tokens", 12, *args, "How many objects are there?")


def other_tower(folder):
    """A vision model of the same sizes, which computes something else."""
    shutil.copytree(EYE, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def other_words(folder):
    """A tokenizer of the same size, of which two tokens have changed places."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("ending", [".pth", "_best.pth"])
def test_chat_needs_no_other_path(project, ending):
    ended = ask(WEIGHTS + ending)
    assert (ended.code, ended.err.count("\n")) == (0, 1)
    assert ended.err.startswith("no image")
    assert ended.out == ask(WEIGHTS + ending, *NAMED).out


def test_it_is_the_same_from_anywhere_and_after_a_move(project, tmp_path, monkeypatch):
    expected = ask(f"{WEIGHTS}.pth").out
    monkeypatch.chdir("/")
    assert ask(project / f"{WEIGHTS}.pth").out == expected
    moved = project.rename(tmp_path / "elsewhere")
    assert ask(moved / f"{WEIGHTS}.pth").out == expected
    monkeypatch.chdir(moved / "runs")
    assert ask("sft_vlm_128.pth").out == expected


@pytest.mark.long
def test_every_command_finds_them(project):
    model = ("--model", f"{WEIGHTS}.pth")
    assert run_mmv("eval", *model, "--data", "rows/sft_data.jsonl", "--json").json["rows"] == 40
    assert run_mmv("convert", *model, "--to", "hf", "--out", "hf", "--no-verify").code == 0
    assert run_mmv("convert", *model, "--to", "safetensors", "--out", "deep/er/w.safetensors").code == 0
    assert ask("deep/er/w.safetensors").out == ask(f"{WEIGHTS}.pth").out
    assert run_mmv("convert", "--model", "deep/er/w.safetensors", "--to", "pth").code == 0
    assert ask("deep/er/w.pth").out == ask(f"{WEIGHTS}.pth").out
    report = run_mmv("info", f"{WEIGHTS}.pth", "--json").json
    assert (report["vision_model"], report["tokenizer"]) == ("eyes/small", "words")


def test_the_config_of_the_run_is_enough(project, tmp_path, monkeypatch):
    expected = ask(f"{WEIGHTS}.pth").out
    for description in project.glob("runs/*.json"):
        description.unlink()
    moved = project.rename(tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    for ending in (".pth", "_best.pth"):
        assert ask(moved / f"{WEIGHTS}{ending}").code == 0
    assert ask(moved / f"{WEIGHTS}.pth").out == expected


def test_others_in_the_standard_folders_are_left_alone(project):
    expected = ask(f"{WEIGHTS}.pth").out
    other_tower(project / VISION_DIR)
    other_words(project / TOKENIZER_DIR)
    assert ask(f"{WEIGHTS}.pth").out == expected


def test_the_standard_folders_serve_where_they_hold_the_same(project):
    expected = ask(f"{WEIGHTS}.pth").out
    shutil.copytree(EYE, project / VISION_DIR)
    shutil.copy(ASSETS / "tokenizer.json", project / TOKENIZER_DIR)
    for folder in ("eyes", "words"):
        shutil.rmtree(folder)
    assert ask(f"{WEIGHTS}.pth").out == expected


@pytest.mark.parametrize(
    ("make", "folder", "message"),
    [
        (other_tower, "eyes/small", "with a different vision model than eyes/small — .* --vision-model"),
        (other_words, "words", "with a different tokenizer than words — .* --tokenizer"),
    ],
)
def test_others_of_the_same_size_are_refused_unless_they_are_named(project, make, folder, message):
    make(project / folder)
    ended = ask(f"{WEIGHTS}.pth")
    assert ended.code == 1
    assert re.search(message, ended.error)
    named = ask(f"{WEIGHTS}.pth", *NAMED)
    assert named.code == 0
    assert f"was trained with a different {'vision model' if make is other_tower else 'tokenizer'}" in named.err


def test_others_in_the_standard_folders_are_refused_where_the_own_ones_are_gone(project):
    other_tower(project / VISION_DIR)
    shutil.rmtree("eyes")
    ended = ask(f"{WEIGHTS}.pth")
    assert ended.code == 1
    assert f"with a different vision model than {VISION_DIR}" in ended.error


def test_both_that_are_gone_are_named_at_once(project):
    for folder in ("eyes", "words"):
        shutil.rmtree(folder)
    ended = ask(f"{WEIGHTS}.pth")
    assert ended.code == 1
    for message in ("eyes/small — give its folder with --vision-model", "words — give its folder with --tokenizer"):
        assert message in ended.error


def test_what_an_older_run_had_is_replaced_only_in_words(project):
    """Without a record of what it was, nothing can be compared."""
    (project / f"{WEIGHTS}.json").unlink()
    shutil.copytree(EYE, project / VISION_DIR)
    shutil.rmtree("eyes")
    ended = ask(f"{WEIGHTS}.pth")
    assert ended.code == 0
    assert f"no longer in eyes/small: using {VISION_DIR} instead" in ended.err


def test_weights_of_unknown_origin_use_the_standard_folders_of_their_project(project, tmp_path, monkeypatch):
    out = tmp_path / "other" / "out"
    out.mkdir(parents=True)
    shutil.copy(project / f"{WEIGHTS}.pth", out / "mine.pth")
    shutil.copytree(EYE, out.parent / VISION_DIR)
    shutil.copy(ASSETS / "tokenizer.json", out.parent / TOKENIZER_DIR)
    assert ask(out / "mine.pth").out == ask(out / "mine.pth", *NAMED).out
    monkeypatch.chdir(out)
    assert ask("mine.pth").code == 0
    ended = ask(BASE)
    assert (ended.code, "no vision model in model/" in ended.error) == (1, True)


def test_an_exported_folder_that_one_stands_in_is_read(project, monkeypatch):
    assert run_mmv("convert", "--model", f"{WEIGHTS}.pth", "--to", "hf", "--out", "hf", "--no-verify").code == 0
    monkeypatch.chdir(project / "hf")
    assert ask(".").code == 0
