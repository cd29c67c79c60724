"""What is wrong with the options is said before a model is loaded, which takes up to a minute."""

from __future__ import annotations

import pytest

from tests.cli.harness import SIGHT, run_mmv, sighted, tiny_data


@pytest.fixture
def mistaken(monkeypatch, tmp_path):
    """`mistaken(words…)` is the error of a command that loads no model."""
    (tmp_path / "file").write_text("")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "notes.txt").write_text("mine")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "predictions.jsonl").write_text("")
    (tmp_path / "pages" / "report.html").write_text("mine")
    monkeypatch.chdir(tmp_path)

    def load(*_):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("minimind_v.core.formats.load.load", load)

    def run(command, *words):
        ended = run_mmv(command, *words, "--model", sighted(), *SIGHT)
        assert ended.code == 2, ended.err
        return ended.error

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "vqa", "--out", "file"), "--out file: file is a file, not a folder"),
        (("--task", "vqa", "--out", "others"), "--out others holds notes.txt, and no evaluation"),
        (("--task", "vqa", "--out", "pages"), "pages/report.html exists and is not a page by mmv"),
        (("--task", "vqa", "--split", "test"), "is one file; only a folder has splits"),
        (("--split", "test"), "is one file; only a folder has splits"),
        (("--task", "vqa", "--gpus", 2, "--device", "cuda"), "--gpus 2 on this machine, which has 0"),
        (("--dtype", "int3"), "dtype"),
    ],
)
def test_eval(mistaken, words, message):
    assert message in mistaken("eval", "--data", tiny_data().data("sft"), *words)


def test_chat(mistaken):
    picture = tiny_data().picture()
    assert "<image> in the system prompt" in mistaken("chat", "What?", "--system", "An <image>.")
    assert "2 <image> marks for 1 image" in mistaken("chat", "<image><image>?", "--image", picture)
    assert "temperature must be at least 0" in mistaken("chat", "What?", "--temperature", -1)


def test_look(mistaken):
    assert "the answer is empty" in mistaken("look", tiny_data().picture(), "What?", "--answer", " ")
