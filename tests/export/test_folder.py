"""Exporting as a command: proven or absent, never over somebody's files, and read again by every other command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minimind_v.core.errors import UsageError
from minimind_v.core.export import folder as folders
from minimind_v.core.export.folder import export, read_manifest
from minimind_v.core.export.targets import Target
from minimind_v.core.files import sweep
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.formats.hf import write as hf
from tests.cli.harness import ASSETS, BASE, EYE, SIGHT, Running, installed, run_mmv, tree
from tests.export.made import exported, jpeg, order, weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder as the installed command writes and verifies it, with what it said."""
    out = tmp_path_factory.mktemp("whole") / "model"
    ended = installed("convert", "--to", "hf", "--model", weights("moe"), *SIGHT, "--out", out, "--json")
    return out, ended


def quick(out, **how):
    return export(order(), "hf", out, check=False, **how)


def test_the_command_writes_verifies_and_reports(whole):
    out, ended = whole
    report = ended.json
    assert (report["out"], report["kind"]) == (str(out), "hf")
    assert report["verified"]["token ids"] == "equal in 3 of 3 prompts"
    assert report["verified"]["largest logit difference"].endswith("in fp32 (allowed: 1e-04)")
    same, _, count = report["verified"]["greedy tokens"].split()[:3]
    assert same == count
    assert tree(out.parent) == sorted(
        f"model/{name}" for name in (
            "README.md", "chat_template.jinja", "config.json", "generation_config.json", "mmv_export.json",
            "model.safetensors", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
            "tokenizer_config.json",
        )
    )  # fmt: skip


def test_there_and_back_again_gives_the_same_bits(whole, tmp_path):
    for to in ("pth", "safetensors"):
        back = tmp_path / f"back.{to}"
        assert run_mmv("convert", "--to", to, "--model", whole[0], "--out", back).code == 0
        before, after = read_checkpoint(weights("moe")), read_checkpoint(back)
        assert before.config == after.config
        assert (before.stage, before.tensors.keys()) == (after.stage, after.tensors.keys())
        for name, tensor in before.tensors.items():
            assert tensor.dtype == after.tensors[name].dtype
            assert torch.equal(tensor, after.tensors[name])


@pytest.mark.parametrize("kind", ["odd", "moe, odd", "moe, none shared"])
def test_odd_sizes_come_back_too(kind):
    before, after = read_checkpoint(weights(kind)), read_checkpoint(exported(kind))
    assert before.config == after.config
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    assert before.tensors.keys() == after.tensors.keys()


def test_a_folder_of_a_folder(whole, tmp_path):
    """What was exported is a source like any other, with its own eye and words."""
    assert run_mmv("convert", "--to", "hf", "--model", whole[0], "--out", tmp_path / "again", "--no-verify").code == 0
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (whole[0] / name).read_bytes()
    again, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", whole[0]))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


@pytest.mark.long
def test_chat_and_eval_take_the_folder_alone(whole, tmp_path, tiny_data, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no standard folders are
    (tmp_path / "picture.jpg").write_bytes(jpeg(0))
    ask = ("chat", "What is it?", "--image", "picture.jpg", "--greedy", "--max-new-tokens", 12)
    expected = run_mmv(*ask, "--model", weights("moe"), *SIGHT)
    answer = run_mmv(*ask, "--model", whole[0])
    assert (answer.code, answer.out) == (0, expected.out)
    rows = ("--data", tiny_data.data("sft"), "--images", tiny_data.images("sft"), "--limit", 4, "--json")
    losses = [
        run_mmv("eval", *rows, "--model", *model).json["loss"] for model in ((whole[0],), (weights("moe"), *SIGHT))
    ]
    assert losses[0] == losses[1]


def test_info_reports_what_it_is_and_where_it_came_from(whole):
    facts = run_mmv("info", whole[0], "--json").json
    assert (facts["kind"], facts["stage"], facts["use_moe"]) == ("hf", "sft", True)
    assert (facts["came_from"], facts["made_by"].split()[0]) == ("sft_vlm_64.pth", "mmv")
    assert facts["bytes"] == sum((whole[0] / name).stat().st_size for name in tree(whole[0]))
    assert "token ids" in facts["verified"]
    assert run_mmv("info", exported(), "--json").json["came_from"].startswith("unknown: not written by")


# --- verification -----------------------------------------------------------------------------------------------------


def spoil_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.layers.1.self_attn.q_proj.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def spoil_json(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_template(folder, old, new):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace(old, new))


SPOILT = {
    "weights": (spoil_weights, "largest logit difference"),
    "template": (lambda folder: spoil_template(folder, "helpful", "harmful"), "token ids"),
    "no pictures": (lambda folder: spoil_template(folder, "{{ '<|image|>' }}", ""), "transformers could not open"),
    "pixels": (lambda folder: spoil_json(folder, "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]), "pixels"),
    "layer": (lambda folder: spoil_json(folder, "config.json", vision_feature_layer=-2), "largest logit difference"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "transformers could not open"),
}


@pytest.mark.long
@pytest.mark.parametrize("what", SPOILT)
def test_an_export_that_is_not_the_same_is_refused_and_gone(what, prover, tmp_path, monkeypatch):
    spoil, message = SPOILT[what]

    def write_and_prove(order, folder, check):
        facts = hf.make(order, folder)
        spoil(folder)
        return facts, prover.call("minimind_v.core.export.prove.verify_hf:verify", order, folder)

    monkeypatch.delitem(folders.TARGETS, "hf")
    monkeypatch.setitem(folders.TARGETS, "hf", Target("", write_and_prove))
    ended = run_mmv("convert", "--to", "hf", "--model", weights("dense"), *SIGHT, "--out", tmp_path / "new" / "out")
    assert ended.code == 1
    assert message in ended.error
    assert list(tmp_path.iterdir()) == []


# --- what is in the way -----------------------------------------------------------------------------------------------


def test_an_export_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "out"
    quick(out)
    before = (out / "config.json").stat().st_mtime_ns
    with pytest.raises(UsageError, match="exists — add --overwrite"):
        quick(out)
    assert (out / "config.json").stat().st_mtime_ns == before
    quick(out, overwrite=True)
    assert (out / "config.json").stat().st_mtime_ns > before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_of_anybody_else_is_ever_replaced(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all my work")
    with pytest.raises(UsageError, match=r"already exists and was not written by `mmv convert` \(thesis.txt\)"):
        quick(mine, overwrite=True)
    out = tmp_path / "out"
    quick(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt was not written by `mmv convert` and would be lost"):
        quick(out, overwrite=True)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        quick(file, overwrite=True)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(UsageError, match="is not usable as an output folder"):
        quick(home, overwrite=True)
    monkeypatch.chdir(home)
    monkeypatch.delenv("HOME")
    with pytest.raises(UsageError, match="is not usable as an output folder"):
        quick(Path(), overwrite=True)
    assert tree(tmp_path / "mine") == ["thesis.txt"]
    assert (out / "notes.txt").read_text() == file.read_text() == "mine"


def test_the_source_is_not_written_over(tmp_path):
    quick(tmp_path / "out")
    ended = run_mmv("convert", "--to", "hf", "--model", tmp_path / "out", "--out", tmp_path / "out", "--overwrite")
    assert ended.code == 2
    assert "contains the source" in ended.error
    assert run_mmv("info", tmp_path / "out").code == 0


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    quick(tmp_path / "out")
    assert read_manifest(tmp_path / "out")["source"]["name"] == "sft_vlm_64.pth"
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o444 == 0o444


# --- bad sources ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "paths", "message"),
    [
        (lambda tmp: BASE, SIGHT, "this text-only base has no projector; `mmv train pretrain` trains one"),
        (lambda tmp: half(tmp), SIGHT, "truncated or damaged"),
        (lambda tmp: tmp, SIGHT, "a folder, not a weights file"),
        (lambda tmp: EYE, SIGHT, "not the weights of a MiniMind model"),
        (lambda tmp: weights("dense"), ("--tokenizer", ASSETS), "no vision model in model/vision_model"),
        (lambda tmp: weights("dense"), ("--vision-model", EYE), "no tokenizer in model"),
        (lambda tmp: wide(tmp), SIGHT, "trained with features of width 32"),
        (lambda tmp: tmp / "nothing.pth", SIGHT, "no weights at"),
    ],
    ids=["base", "half", "folder", "eye", "blind", "wordless", "other eye", "none"],
)
def test_a_source_that_is_not_good_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, model, paths, message):
    monkeypatch.chdir(tmp_path)
    given = model(tmp_path)
    before = tree(tmp_path)
    ended = run_mmv("convert", "--to", "hf", "--model", given, *paths, "--out", tmp_path / "a" / "b", "--no-verify")
    assert ended.code == 1
    assert message in ended.error
    assert tree(tmp_path) == before
    assert not (tmp_path / "a").exists()


def half(tmp):
    content = weights("dense").read_bytes()
    (tmp / "half.pth").write_bytes(content[: len(content) // 2])
    return tmp / "half.pth"


def wide(tmp):
    state = torch.load(weights("dense"), weights_only=True)
    state["vision_proj.vision_proj.0.weight"] = torch.ones(64, 32)
    torch.save(state, tmp / "wide.pth")
    return tmp / "wide.pth"


@pytest.mark.long
def test_a_full_disk_leaves_nothing(small_disk):
    disk = small_disk(1)
    for check in ((), ("--no-verify",)):
        ended = run_mmv("convert", "--to", "hf", "--model", weights("dense"), *SIGHT, "--out", disk / "out", *check)
        assert ended.code == 1
        assert "No space left on device" in ended.error or "os error 28" in ended.error
        assert list(disk.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(tmp_path, number):
    out = tmp_path / "place"
    out.mkdir()
    running = Running(
        tmp_path / "said", "convert", "--to", "hf", "--model", weights("dense"), *SIGHT, "--out", out / "out"
    )
    running.until(lambda: any(path.name == "tokenizer.json" for path in out.rglob("*")))  # written, being verified
    ended = running.send(number).wait()
    assert ended.code == 128 + number
    assert list(out.iterdir()) == []
    assert running.left_behind() == []


@pytest.mark.long
def test_what_a_killed_conversion_left_goes_with_the_next(tmp_path):
    parent = tmp_path / "place"
    parent.mkdir()
    args = ("convert", "--to", "hf", "--model", weights("dense"), *SIGHT, "--out", parent / "out")
    running = Running(tmp_path / "said", *args)
    running.until(lambda: any(path.name == "tokenizer.json" for path in parent.rglob("*")))
    (living,) = parent.iterdir()
    sweep(parent / "out")
    assert living.is_dir()  # of a process that lives
    running.send(signal.SIGKILL).wait()
    assert [path.name for path in parent.iterdir()] == [living.name]
    for name in (".out.mine.tmp", ".other.abcdefgh.tmp"):  # nobody's, and another's
        (parent / name).mkdir()
    assert waited_for(lambda: not running.left_behind())
    assert run_mmv(*args, "--no-verify").code == 0
    assert sorted(path.name for path in parent.iterdir()) == [".other.abcdefgh.tmp", ".out.mine.tmp", "out"]


def waited_for(happened):
    for _ in range(1000):
        if happened():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.long
def test_what_a_killed_writer_of_a_file_left_goes_with_the_next(tmp_path):
    out = tmp_path / "w.pth"
    code = (
        "import sys, time; from minimind_v.core.files import write_atomically\n"
        "def write(file):\n    file.write(b'half'); file.flush(); print('here', flush=True); time.sleep(100)\n"
        f"write_atomically(__import__('pathlib').Path({str(out)!r}), write)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    writer.stdout.readline()
    (left,) = tmp_path.iterdir()
    sweep(out)
    assert left.exists()
    writer.kill()
    writer.communicate()
    assert run_mmv("convert", "--to", "pth", "--model", weights("dense"), "--out", out).code == 0
    assert tree(tmp_path) == ["w.json", "w.pth"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        quick(tmp_path / "file" / "out")
    assert os.listdir(tmp_path) == ["file"]


def test_a_moved_folder_is_as_good(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "elsewhere")
    assert read_checkpoint(tmp_path / "elsewhere").config == read_checkpoint(whole[0]).config
