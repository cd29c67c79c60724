"""Wrong words get right answers: what is wrong, and the line that was meant."""

from __future__ import annotations

import os
import shlex
import shutil

import pytest

from minimind_v.core.wording import plural
from tests.cli.harness import ASSETS, SIGHT, installed, read_rows, run_mmv, write_rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train stf", "(did you mean 'sft'?)"),
        ("train pretrian", "(did you mean 'pretrain'?)"),
        ("download weigths", "(did you mean 'weights'?)"),
        ("download all --hub modelscop", "(did you mean 'modelscope'?)"),
        ("convert --to safetensor", "(did you mean 'safetensors'?)"),
        ("data stats x.jsonl --stage pretain", "(did you mean 'pretrain'?)"),
        ("trian", "Did you mean 'train'?"),
        ("data chekc x.jsonl", "Did you mean 'check'?"),
        ("eval --modle x", "--model"),
        # what is missing, and what may stand there
        ("convert", "'--to'. hf: a folder for transformers; gguf: a folder for llama.cpp and Ollama; safetensors: "),
        ("train", "'STAGE'. pretrain: captions train the projector. sft: conversations train the whole model. Choose"),
        ("upload x", "Missing option '--repo'. The repository; created if it does not exist"),
        # a word too many
        ("chat --image a.jpg b.png 'What is this?'", "mmv chat --image a.jpg --image b.png 'What is this?'"),
        ("chat --image a.jpg b.png c.webp 'Which?'", "mmv chat --image a.jpg --image b.png --image c.webp 'Which?'"),
        ("chat what is this", "mmv chat 'what is this'"),
        ("chat --image a.jpg what is this", "in quotes: mmv chat --image a.jpg 'what is this'"),
        ("chat a.jpg 'What is this?'", "each image needs its own --image: mmv chat --image a.jpg 'What is this?'"),
        ("chat a.jpg b.jpg", "mmv chat --image a.jpg --image b.jpg 'What is in the image?'"),
        ("look 'What is this?' a.jpg", "the question stands last: mmv look a.jpg 'What is this?'"),
        ("serve out", "each model needs its own --model: mmv serve --model out"),
        ("web a.pth b.pth", "mmv web --model a.pth --model b.pth"),
        ("data check x.jsonl y.jsonl", "'y.jsonl'"),
        ("info x y", "'y': too many words"),
        # twice what can be one thing only
        ("eval --model a.pth --model b.pth", "--model was given 2 times"),
        ("eval --data a.jsonl --data b.jsonl --data c.jsonl", "--data was given 3 times"),
        ("train sft --data a.jsonl --data b.jsonl", "--data was given 2 times"),
        ("train sft --images a.zip --images b.zip", "--images was given 2 times"),
        ("data check a.jsonl --images a.zip --images b.zip", "--images was given 2 times"),
        ("convert --to hf --model a.pth --model b.pth", "--model was given 2 times"),
        # a variable of the shell without a value, where "" would be the current folder
        ("train sft --out ''", "--out is empty"),
        ("eval --data=", "--data is empty"),
        ("serve --model a.pth --model ''", "--model is empty"),
        ("data check ''", "FILE is empty"),
        ("look '' what", "the name of an image is empty"),
    ],
)
def test_the_line_that_was_meant_is_suggested(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run_mmv(*shlex.split(line))
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("line", ["", "train", "eval", "chat", "data", "data check", "data split", "demo"])
def test_h_is_help(line):
    short, long = run_mmv(*line.split(), "-h"), run_mmv(*line.split(), "--help")
    assert (short.code, short.out) == (0, long.out)
    assert "-h, --help" in short.out


def test_options_that_may_be_repeated_still_may(tiny_data):
    line = tiny_data.train("nowhere", epochs=None)
    sets = [word for n in (3, 4) for word in ("--set", f"epochs={n}")]
    assert "epochs: 4" in run_mmv(*line, *sets, "--print-config").out


# --- a run ------------------------------------------------------------------------------------------------------------


def test_report_takes_the_folder_that_one_stands_in_and_what_is_in_it(trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained.out / "sft_vlm_128", tmp_path / "sft_vlm_128")
    monkeypatch.chdir(run)
    for name in (".", "metrics.jsonl", "config.yaml", "../sft_vlm_128.pth", "../sft_vlm_128_best.pth", ".."):
        ended = run_mmv("report", name)
        assert ended.code == 0, ended.err
        assert os.path.samefile(ended.out.strip(), run / "report.html")
    monkeypatch.chdir(tmp_path / "sft_vlm_128" / "states")
    assert os.path.samefile(run_mmv("report", "..").out.strip(), run / "report.html")
    for name in (".", "/", "none", "none.pth"):
        ended = run_mmv("report", name)
        assert (ended.code, "no run in" in ended.error) == (1, True)


def test_the_folder_of_a_run_stands_for_its_weights(trained, tiny_data, tmp_path, monkeypatch):
    run = trained.out / "sft_vlm_128"
    asked = ("chat", "What colour is the star?", *SIGHT, "--greedy", "--max-new-tokens", 4, "--model")
    ended = run_mmv(*asked, run)
    assert ended.code == 0, ended.err
    assert ended.out == run_mmv(*asked, run.with_suffix(".pth")).out
    scored = run_mmv("eval", "--model", run, "--data", tiny_data.data("sft"), *SIGHT, "--limit", 1, "--json").json
    assert scored["model"] == str(run.with_suffix(".pth"))
    out = tmp_path / "w.safetensors"
    assert run_mmv("convert", "--to", "safetensors", "--model", run, "--out", out).code == 0
    monkeypatch.chdir(run)
    assert run_mmv("info", ".", "--json").json["kind"] == "run"


def test_a_folder_of_weights_names_them(trained):
    error = run_mmv("chat", "hello", "--model", trained.out, *SIGHT).error
    files = ", ".join(str(trained.out / f"{stage}_vlm_128.pth") for stage in ("pretrain", "sft"))
    assert error == f"{trained.out} has several weights — name one of {files}"


# --- rows -------------------------------------------------------------------------------------------------------------


def test_one_row_is_one_row(tiny_data, tmp_path, guessed_time):
    assert [plural(n, "row") for n in (0, 1, 2, 1000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]
    row_file = write_rows(tmp_path / "sft.jsonl", read_rows(tiny_data.data("sft"))[:1])
    images = ("--images", tiny_data.images("sft"))
    assert "sft.jsonl: 1 row, 1 of them" in run_mmv("data", "check", row_file, *images, *SIGHT).out
    assert "1 row of " in run_mmv("data", "stats", row_file, *images, *SIGHT).out
    assert run_mmv("data", "convert", row_file, tmp_path / "one.parquet", *images).err.endswith("one.parquet: 1 row\n")
    assert "has only 1 row" in run_mmv("data", "preview", row_file, *images, *SIGHT, "--start", 2).error
    shown = run_mmv("data", "preview", row_file, *images, *SIGHT, "--html", tmp_path / "p.html")
    assert "1 row of" in (tmp_path / "p.html").read_text(encoding="utf-8"), shown.err


def test_no_option_is_named_that_a_command_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("check", "stats", "preview"):
        assert "--data" not in run_mmv("data", command, "none.jsonl", "--tokenizer", ASSETS).error


@pytest.mark.long
def test_a_copy_without_faults_ends_well_and_one_that_cannot_be_written_does_not(tiny_data, tmp_path):
    rows = write_rows(tmp_path / "sft.jsonl", ["{", *read_rows(tiny_data.data("sft"))[:4]])
    line = ("data", "check", rows, "--images", tiny_data.images("sft"), *SIGHT)
    assert installed(*line, "--workers", 1).code == 1
    ended = installed(*line, "--workers", 1, "--fix", tmp_path / "clean.jsonl")
    assert ended.code == 0, ended.err
    assert f"it accepts {tmp_path / 'clean.jsonl'}" in ended.err
    all_bad = write_rows(tmp_path / "bad.jsonl", ["{"])
    ended = run_mmv("data", "check", all_bad, *SIGHT, "--fix", tmp_path / "none.jsonl")
    assert (ended.code, "nothing to write" in ended.error) == (1, True)


@pytest.mark.parametrize(
    "command",
    [
        "train sft --out {}", "train sft --data {}", "train sft --config={}", "plan sft --init {}",
        "data check {}", "data stats rows.jsonl --images {}", "data convert rows.jsonl {}", "data preview {}",
        "data split rows.jsonl {}", "eval --model {}", "chat --image {}", "chat {}", "convert --to hf --out {}",
        "upload {}", "demo --out {}", "info {}", "report {}", "download --dir {}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("word", ["a\0b", "a\ud800b"])
def test_what_no_file_can_be_called_ends_in_one_line(command, word):
    before, _, _ = command.partition("{}")
    args = command.format(word).split(" ")
    ended = run_mmv(*args)
    assert ended.code == 2, ended.err
    assert "\0" not in ended.err
    option = before.split()[-1].rstrip("=")
    assert ended.error.startswith(option if option.startswith("--") else "an argument")
    assert "contains a NUL character" in ended.error or "contains half of a character" in ended.error


def test_control_characters_of_a_name_are_shown_as_what_they_are():
    ended = run_mmv("info", "a\x1b[2Jb\x07\nc")
    assert ended.code == 1
    assert "a\\x1b[2Jb\\x07 c" in ended.error
