"""`mmv convert --to gguf` as its user has it: made, proven, read again, refused."""

import json

import pytest

from minimind_v.core.export.prove import verify_gguf
from minimind_v.core.formats.gguf import file as store
from minimind_v.core.formats.gguf import language
from tests.cli import harness
from tests.cli.harness import BASE, SIGHT, run_mmv, tree
from tests.formats.gguf.graphs import File


@pytest.fixture(scope="module")
def sighted():
    return harness.sighted()


@pytest.fixture
def convert(sighted, tmp_path, monkeypatch):
    """The command, without llama.cpp: what that says is tested by `make interop`."""
    monkeypatch.setattr(verify_gguf, "_llama_is_installed", lambda: False)

    def run(*more, model=sighted, out=tmp_path / "gguf"):
        return run_mmv("convert", "--to", "gguf", "--model", model, *SIGHT, "--out", out, *more)

    return run


def test_a_folder_is_written_proven_and_read_again(convert, sighted, tmp_path):
    done = convert("--json")
    verified = done.json["verified"]
    assert verified["weights"] == "largest difference 0 of the largest value"
    assert verified["logits"].startswith("largest difference 0.00%")
    assert {path.name for path in (tmp_path / "gguf").iterdir()} >= {"model.gguf", "mmproj.gguf", "Modelfile"}
    question = ("chat", "What colour is the star?", "--greedy", "--max-new-tokens", 8, "--model")
    answers = {
        run_mmv(*question, *model).out
        for model in ((sighted, *SIGHT), (tmp_path / "gguf",), (tmp_path / "gguf/model.gguf",))
    }
    assert len(answers) == 1


def test_back_to_a_checkpoint(convert, sighted, tmp_path):
    import torch

    assert convert().code == 0
    back = tmp_path / "back.pth"
    assert (
        run_mmv("convert", "--to", "pth", "--model", tmp_path / "gguf", "--out", back, "--dtype", "float16").code == 0
    )
    before, after = (torch.load(path, weights_only=True) for path in (sighted, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_info_says_what_it_is(convert, tmp_path):
    assert convert("--quantize", "q8_0").code == 0
    report = run_mmv("info", tmp_path / "gguf", "--json").json
    assert (report["kind"], report["architecture"], report["llama.block_count"]) == ("gguf", "llama", 4)
    assert "Q8_0" in report["types"]
    clip = run_mmv("info", tmp_path / "gguf" / "mmproj.gguf", "--json").json
    assert (clip["architecture"], clip["clip.vision.image_size"], clip["source"]) == ("clip", 64, report["source"])


def test_what_is_wrong_is_not_left_standing(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "interleave", lambda weight, head_dim: weight)
    done = convert()
    assert done.code == 1
    assert "not written, because it differs" in done.error
    assert tree(tmp_path) == []


def test_a_full_disk_leaves_nothing(convert, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Writer, "close", full)
    done = convert()
    assert done.code == 1
    assert "No space left on device" in done.error
    assert tree(tmp_path) == []


def test_mistakes_are_one_line(convert, sighted, tmp_path):
    assert "--quantize 'q9' must be one of f32" in convert("--quantize", "q9").error
    assert "use --quantize" in convert("--dtype", "float16").error
    assert (
        "--quantize is for --to gguf"
        in run_mmv("convert", "--to", "pth", "--model", sighted, "--quantize", "f16").error
    )
    assert "text-only base has no projector" in convert(model=BASE).error
    assert not (tmp_path / "gguf").exists()
    assert convert().code == 0
    before = (tmp_path / "gguf" / "model.gguf").read_bytes()
    assert "exists — add --overwrite" in convert("--quantize", "q8_0").error
    assert (tmp_path / "gguf" / "model.gguf").read_bytes() == before
    assert convert("--quantize", "q8_0", "--overwrite").code == 0
    assert "Q8_0" in File(tmp_path / "gguf" / "model.gguf").types.values()


def test_a_missing_half_of_the_pair_is_reported(convert, tmp_path):
    assert convert().code == 0
    (tmp_path / "gguf" / "mmproj.gguf").unlink()
    asked = run_mmv("chat", "Hi", "--model", tmp_path / "gguf")
    assert asked.code == 1
    assert "mmproj.gguf is missing, so the model cannot encode images" in asked.error
    assert json.loads(run_mmv("info", tmp_path / "gguf", "--json").out)["kind"] == "gguf"
