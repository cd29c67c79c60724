"""`mmv data check | convert | split` as they are typed: what they print, how they end, what they leave."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from minimind_v.core.rows.stores import open_rows
from tests.cli.harness import ROWS, SIGHT, installed, read_rows, run_mmv, tiny_data, tree, write_rows


@pytest.fixture
def broken(tmp_path):
    """The rows of the tiny data, the third of them no JSON, the fifth with a picture that is not there."""
    rows = read_rows(tiny_data().data("sft"))
    rows[2] = "{"
    rows[4] = rows[4] | {"image": "none.jpg"}
    rows[7] = rows[6]
    return write_rows(tmp_path / "rows.jsonl", rows)


def test_check_of_whole_rows_by_the_installed_command():
    ended = installed("data", "check", tiny_data().data("sft"), *SIGHT)
    assert ended.code == 0, ended.err
    assert "40 rows, 40 of them usable for training" in ended.out


def test_check_names_what_is_wrong_and_fixes_it(broken, tmp_path):
    line = ("data", "check", broken, "--images", tiny_data().images("sft"), *SIGHT)
    ended = run_mmv(*line, "--json", "--fix", tmp_path / "clean.parquet")
    assert ended.code == 0, "the copy that was asked for is there"
    assert "training would refuse" in ended.err, "two of forty rows are more than training allows"
    assert "error" not in ended.err
    report = json.loads(ended.out)
    assert [(problem["row"], problem["kind"]) for problem in report["problems"]] == [
        (3, "json"), (5, "image missing"), (8, "duplicate row")
    ]  # fmt: skip
    assert all(set(problem) >= {"row", "kind", "message"} for problem in report["problems"])
    assert report["fixed"] == {"files": [str(tmp_path / "clean.parquet")], "rows": 37, "left_out": 3}
    assert len(open_rows(tmp_path / "clean.parquet")) == 37
    spoken = run_mmv(*line)
    assert spoken.code == 1
    assert "training would refuse these rows: 2 of 40 rows are broken" in spoken.error
    again = run_mmv("data", "check", tmp_path / "clean.parquet", *SIGHT, "--json")
    assert again.json["problems"] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("check", "none.jsonl"), "no data file"),
        (("check", "{rows}", "--tokenizer", "nowhere"), "mmv download tokenizer"),
        (("check", "{rows}", "--against", "none.jsonl"), "no data file"),
        (("convert", "{rows}", "rows.csv"), "must end in .jsonl or .parquet"),
        (("split", "{rows}", "--out", "parts", "--held-out", "1000"), "one side empty"),
        (("split", "{rows}", "--out", "parts", "--held-out", "0"), "must be above 0"),
        (("split", "{rows}", "--out", "parts", "--held-out", "nan"), "must be above 0"),
        (("split", "{rows}", "--out", "parts", "--held-out", "inf"), "must be above 0"),
        (("split", "{rows}", "--out", "parts", "--held-out", "1.5"), "a whole number of rows"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = [str(tiny_data().data("sft")) if arg == "{rows}" else arg for arg in args]
    paths = SIGHT if args[0] == "check" and "--tokenizer" not in args else SIGHT[:2] if args[0] == "check" else ()
    ended = run_mmv("data", *line, *paths)
    assert ended.code in (1, 2)
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert tree(tmp_path) == []


def test_names_that_are_no_text(tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    converted, back = odd / "rows.parquet", odd / "back.jsonl"
    assert run_mmv("data", "convert", tiny_data().data("sft"), converted).code == 0
    assert run_mmv("data", "convert", converted, back, "--json").json["rows"] == ROWS
    checked = run_mmv("data", "check", converted, *SIGHT, "--json")
    assert checked.json["problems"] == []
    report = run_mmv("data", "split", converted, "--out", odd / "parts", "--held-out", "0.5", "--json").json
    assert report["train"] == str(odd / "parts" / "train.parquet")


def test_a_folder_with_the_name_of_a_file_is_no_shard(tmp_path):
    (tmp_path / "rows" / "old.parquet").mkdir(parents=True)
    run_mmv("data", "convert", tiny_data().data("sft"), tmp_path / "rows" / "new.parquet")
    assert run_mmv("info", tmp_path / "rows", "--json").json["rows"] == ROWS


def test_convert_and_split(tmp_path):
    out = tmp_path / "rows.parquet"
    assert run_mmv("data", "convert", tiny_data().data("sft"), out, "--json").json == {
        "files": [str(out)], "rows": 40, "resumed_at": 0
    }  # fmt: skip
    again = run_mmv("data", "convert", tiny_data().data("sft"), out)
    assert (again.code, "--overwrite" in again.error) == (2, True)
    report = run_mmv("data", "split", out, "--out", tmp_path / "parts", "--held-out", "0.25", "--json").json
    assert (report["train_rows"], report["held_out_rows"]) == (30, 10)
    assert len(open_rows(tmp_path / "parts" / "held_out.parquet")) == 10


@pytest.mark.long
def test_a_model_trains_and_is_scored_on_parquet(tmp_path):
    data = tmp_path / "rows.parquet"
    run_mmv("data", "convert", tiny_data().data("sft"), data)
    trained = run_mmv(*tiny_data().train(tmp_path / "out", data=data, images=None, max_steps=2, workers=1))
    assert trained.code == 0, trained.err
    scored = run_mmv("eval", "--model", tmp_path / "out" / "pretrain_vlm_128.pth", "--data", data, *SIGHT, "--json")
    assert scored.json["rows"] == 40
    assert run_mmv("info", data, "--json").json["rows"] == 40


def test_text_rows_are_reported_as_information(tmp_path):
    rows = read_rows(tiny_data().data("sft"))[:4]
    for message in rows[1]["conversations"]:
        message["content"] = message["content"].replace("<image>", "")
    data = write_rows(tmp_path / "rows.jsonl", rows)
    line = ("data", "check", data, "--images", tiny_data().images("sft"), *SIGHT)
    ended = run_mmv(*line)
    assert ended.code == 0, ended.err
    assert "information: 1 of 4 rows have an image but no <image> in their text: text rows" in ended.out
    assert f"{data}:2" in ended.out
    fixed = run_mmv(*line, "--json", "--fix", tmp_path / "clean.parquet").json
    assert (fixed["text_rows"]["count"], fixed["fixed"]["rows"]) == (1, 4)


@pytest.fixture
def splits(tmp_path):
    """A folder of shards: 3 rows to train on, 2 for validation, 1 to test."""
    folder, rows, begin = tmp_path / "set", read_rows(tiny_data().data("sft")), 0
    (folder / "data").mkdir(parents=True)
    for name, count in (("train-00000-of-00002", 2), ("train-00001-of-00002", 1), ("validation-00000-of-00001", 2),
                        ("test-00000-of-00001", 1)):  # fmt: skip
        data = write_rows(tmp_path / f"{name}.jsonl", rows[begin : begin + count])
        out = folder / "data" / f"{name}.parquet"
        assert run_mmv("data", "convert", data, out, "--images", tiny_data().images("sft")).code == 0
        begin += count
    return folder


def test_a_split_reports_each_of_its_passes_over_the_rows(tiny_data, tmp_path):
    rows = tiny_data.data("sft")
    assert run_mmv("data", "convert", rows, tmp_path / "rows.parquet").code == 0
    for file in (rows, tmp_path / "rows.parquet"):
        ended = run_mmv("data", "split", file, "--out", tmp_path / file.suffix[1:], "--held-out", 0.5)
        assert ended.code == 0, ended.err
        counts = re.findall(r"^(\w+ rows) (\d+)/(\d+),", ended.err, re.MULTILINE)
        assert {total for _, _, total in counts} == {str(ROWS)}
        assert [(what, int(done)) for what, done, _ in counts if int(done) == ROWS] == [
            ("reading rows", ROWS), ("writing rows", ROWS),
        ]  # fmt: skip


def test_the_commands_read_one_split_and_say_which(splits, tmp_path, guessed_time):
    out = {"convert": [tmp_path / "{}.jsonl"], "split": ["--out", tmp_path / "{}", "--held-out", "1"],
           "preview": ["--html", tmp_path / "{}.html"], "check": [], "stats": []}  # fmt: skip
    counts = {"check": "rows", "stats": "rows", "convert": "rows"}
    for command, options in out.items():
        paths = SIGHT if command in ("check", "stats", "preview") else ()
        for chosen, rows in ((None, 3), ("val", 2), ("all", 6)):
            more = ("--split", chosen) if chosen else ()
            given = [str(word).replace("{}", f"{command}-{chosen}") for word in options]
            ended = run_mmv("data", command, splits, *given, *paths, *more, "--json")
            assert ended.code == 0, ended.err
            message = {
                None: "reading the split train (2 files), not",
                "val": "reading the split validation (1 file), not",
                "all": "all splits together",
            }[chosen]
            assert message in ended.err, (command, chosen)
            if command in counts:
                assert ended.json[counts[command]] == rows, (command, chosen)
            elif command == "preview":
                assert len(ended.json["rows"]) == rows
            else:
                assert ended.json["train_rows"] + ended.json["held_out_rows"] == rows
        wrong = run_mmv("data", command, splits, *options, *paths, "--split", "tset")
        assert (wrong.code, "did you mean 'test'" in wrong.error) == (2, True)
    against = run_mmv("data", "check", splits, "--against", splits, *SIGHT, "--json")
    assert "reading the split test" in against.err
    assert run_mmv("info", splits, "--json").json["split"] == "train"


@pytest.mark.long
def test_a_model_trains_on_one_split_and_is_scored_on_another(splits, tmp_path):
    line = tiny_data().train(tmp_path / "out", data=splits, images=None, batch_size=1)
    trained = run_mmv(*line)
    assert trained.code == 0, trained.err
    assert "reading the split train (2 files), not" in trained.err
    assert "3 rows of" in trained.err
    scoring = ("eval", "--model", tmp_path / "out" / "pretrain_vlm_128.pth", "--data", splits, *SIGHT, "--json")
    for more, name, rows in (((), "test", 1), (("--split", "train"), "train", 3)):
        scored = run_mmv(*scoring, *more)
        assert (scored.json["split"], scored.json["rows"]) == (name, rows)
        assert f"reading the split {name} (" in scored.err
    other = run_mmv(*line, "--split", "validation", "--resume")
    assert other.code == 2
    assert "data.split: nothing in the interrupted run, validation now" in other.err
    planned = run_mmv(*line[:1], "plan", *line[1:], "--split", "test", "--json")
    assert "reading the split test" in planned.err
