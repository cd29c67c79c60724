"""Nothing that a user made is written over or deleted by a wrong word: every file is afterwards what it was before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.harness import ASSETS, BASE, EYE, ROOT, SIGHT, read_rows, run_mmv, write_rows


@pytest.fixture
def mine(tiny_data, tmp_path, monkeypatch):
    """A folder of a user's own, in which to work: rows, pictures, weights, notes."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_data.data("sft"), "cats.jsonl")
    shutil.copy(tiny_data.images("sft"), "cats_images.zip")
    os.symlink("cats.jsonl", "link.jsonl")
    assert run_mmv("data", "convert", "cats.jsonl", "shards/part-0.parquet").code == 0
    write_rows(tmp_path / "held.jsonl", read_rows(tiny_data.data("sft"))[:3])
    Path("notes.html").write_text("<html>my notes</html>")
    Path("mine.json").write_text('[{"conversations": []}]')
    Path("mine.safetensors").write_bytes(BASE.read_bytes())
    Path("out/sft_vlm_128").mkdir(parents=True)
    Path("out/sft_vlm_128/diary.txt").write_text("mine")
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NO_FOLDER = "cats.jsonl is a file, not a folder — name another folder"
INPUT = "is an input of this command"
SEE = f"--tokenizer {ASSETS} --vision-model {EYE}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # what is read, under its own name or another one
        ("data check cats.jsonl --fix cats.jsonl --overwrite " + SEE, INPUT),
        ("data check cats.jsonl --fix ./shards/../cats.jsonl --overwrite " + SEE, INPUT),
        ("data check link.jsonl --fix cats.jsonl --overwrite " + SEE, INPUT),
        ("data check cats.jsonl --against held.jsonl --fix held.jsonl --overwrite " + SEE, INPUT),
        ("data check shards/part-0.parquet --images cats_images.zip --fix cats.jsonl --overwrite " + SEE,
         f"cats_images.zip {INPUT}"),
        ("data convert cats.jsonl cats.jsonl --overwrite", INPUT),
        ("data convert cats.jsonl link.jsonl --overwrite", INPUT),
        ("data convert shards shards/part-0.parquet --overwrite", "would become a part of the rows in shards"),
        ("data convert shards shards/more.parquet", "would become a part of the rows in shards"),
        ("data split shards --out shards --held-out 4", "would become a part of the rows in shards"),
        ("data split shards --out shards/parts --held-out 4", "would become a part of the rows in shards"),
        # what is there
        ("data convert cats.jsonl held.jsonl", "exists — add --overwrite"),
        ("data check cats.jsonl --fix held.jsonl " + SEE, "exists — add --overwrite"),
        ("data stats cats.jsonl --html notes.html " + SEE, "not a page by mmv"),
        ("data stats cats.jsonl --html cats.jsonl " + SEE, "not a page by mmv"),
        ("data stats cats.jsonl --html cats_images.zip " + SEE, "not a page by mmv"),
        ("data stats cats.jsonl --html shards " + SEE, "is a folder"),
        ("data stats cats.jsonl --html new.txt " + SEE, "new.txt has no ending of a page — name it new.html"),
        ("data preview cats.jsonl --html new " + SEE, "name it new.html"),
        ("look cats.jpg What? --html new.txt", "name it new.html"),
        ("compare held.jsonl cats.jsonl --html new.htmlx", "name it new.html"),
        ("data preview cats.jsonl --html held.jsonl " + SEE, "not a page by mmv"),
        # weights
        ("convert --to safetensors --model mine.safetensors --out mine.safetensors --overwrite", "is the source"),
        ("convert --to pth --model mine.safetensors --overwrite", "mine.json does not describe weights"),
        ("convert --to pth --model mine.safetensors --out shards --overwrite", "must end with .pth"),
        ("demo --out .", "contains other files"),
        ("demo --out shards", "contains other files"),
        # a file where a folder is to be written: before anything is loaded
        ("demo --out cats.jsonl", NO_FOLDER),
        ("train sft --out cats.jsonl", NO_FOLDER),
        ("train sft --out cats.jsonl/inside", NO_FOLDER),
        ("plan sft --out cats.jsonl", NO_FOLDER),
        ("eval --task vqa --data held.jsonl --out cats.jsonl", NO_FOLDER),
        ("data split cats.jsonl --out held.jsonl", "held.jsonl is a file, not a folder"),
        ("convert --to hf --model mine.safetensors --out cats.jsonl " + SEE, NO_FOLDER),
        ("download dataset --dry-run --dir cats.jsonl", NO_FOLDER),
    ],
)  # fmt: skip
def test_a_wrong_word_changes_nothing(line, message, mine):
    before = contents(mine)
    ended = run_mmv(*line.split())
    assert (ended.code, message in ended.error) == (2, True), ended.err
    assert contents(mine) == before


def test_a_page_of_ours_is_made_again(mine):
    for _ in range(2):
        assert run_mmv("data", "preview", "cats.jsonl", *SIGHT, "--rows", 1, "--html", "notes2.html").code == 0
    Path("empty.html").touch()
    assert run_mmv("data", "preview", "cats.jsonl", *SIGHT, "--rows", 1, "--html", "empty.html").code == 0


def test_a_report_of_ones_own_stays(trained, tmp_path):
    run = shutil.copytree(trained.out / "pretrain_vlm_128", tmp_path / "pretrain_vlm_128")
    (run / "report.html").write_text("my report")
    assert "not a page by mmv" in run_mmv("report", run).error
    assert (run / "report.html").read_text() == "my report"


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_a_run_does_not_write_over_what_it_starts_from(tiny_data, sighted, tmp_path, more):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("sft_vlm_128", "sft_vlm_128_best"):
        shutil.copy(sighted, out / f"{name}.pth")
        before = contents(tmp_path)
        ended = run_mmv(*tiny_data.train(out, "sft", init=out / f"{name}.pth"), *more)
        assert (ended.code, "this run would overwrite" in ended.error) == (2, True), ended.err
        assert contents(tmp_path) == before


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_or_a_json_of_something_else_stays(tiny_data, tmp_path, more):
    (tmp_path / "out" / "pretrain_vlm_128").mkdir(parents=True)
    (tmp_path / "out" / "pretrain_vlm_128" / "report.html").write_text("mine")
    before = contents(tmp_path)
    error = run_mmv(*tiny_data.train(tmp_path / "out"), *more).error
    assert "is not a run folder (it contains report.html)" in error
    assert contents(tmp_path) == before
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "pretrain_vlm_128.json").write_text("[]")
    assert "does not describe weights" in run_mmv(*tiny_data.train(tmp_path / "rows"), *more).error
    assert (tmp_path / "rows" / "pretrain_vlm_128.json").read_text() == "[]"


def test_the_curves_of_a_run_stay_where_its_weights_were_moved_away(trained, tiny_data, tmp_path):
    out = shutil.copytree(trained.out, tmp_path / "out")
    for path in (out / "pretrain_vlm_128.pth", out / "pretrain_vlm_128.json"):
        path.unlink()
    shutil.rmtree(out / "pretrain_vlm_128" / "states")
    before = contents(out)
    ended = run_mmv(*tiny_data.train(out))
    assert (ended.code, "without weights" in ended.error) == (2, True)
    assert contents(out) == before


def test_to_resume_beside_a_run_of_another_size_says_which(trained, tiny_data, tmp_path):
    shutil.copytree(trained.out / "pretrain_vlm_128" / "states", tmp_path / "pretrain_vlm_128" / "states")
    before = contents(tmp_path)
    line = tiny_data.train(tmp_path, preset="small", init="none")
    ended = run_mmv(*line, "--set", "model.num_hidden_layers=1", "--resume")
    assert ended.code == 2
    assert f"{tmp_path / 'pretrain_vlm_128'} contains a run, of --preset demo" in ended.error
    assert contents(tmp_path) == before


# --- make -------------------------------------------------------------------------------------------------------------


def test_make_clean_takes_nothing_that_somebody_made(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["out/sft_vlm_512.pth", "dataset/a.jsonl", "model/tokenizer.json", "demo/report.html", "work/venv.txt"]
    for name in [*kept, ".venv/bin/python", "build/x", "m.egg-info/y"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    env = os.environ | {"VENV": "work"}
    subprocess.run(["make", "clean"], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert sorted(contents(tmp_path)) == sorted(["Makefile", *kept])


def test_weights_with_their_own_description_may_be_replaced(mine, sighted):
    shutil.copy(sighted, "w.safetensors")
    Path("w.json").write_text(json.dumps({"stage": "sft", "model": {}}))
    line = ("convert", "--to", "pth", "--model", "mine.safetensors", "--out", "w.pth")
    assert run_mmv(*line).code == 2
    assert run_mmv(*line, "--overwrite").code == 0
