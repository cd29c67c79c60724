"""`mmv data stats` and `mmv data preview` as a user runs them."""

from __future__ import annotations

from tests.cli.harness import SIGHT, installed, run_mmv, tree, write_rows
from tests.tokenizers_made import thinking_tokenizer


def test_stats(tiny_data, tmp_path, guessed_time):
    page = tmp_path / "stats.html"
    ended = run_mmv("data", "stats", tiny_data.data("pretrain"), *SIGHT, "--html", page)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].startswith("40 rows of ")
    assert "read as pretrain data" in lines[0]
    assert "steps       12: 4 epochs in batches of 16" in ended.out
    assert "about 1.5 hours — a guess" in ended.out
    assert "█" in ended.out
    assert "\x1b" not in ended.out
    assert "<svg" in page.read_text()
    assert tree(tmp_path) == ["stats.html"]


def test_stats_as_json(tiny_data, guessed_time):
    counts = run_mmv("data", "stats", tiny_data.data("sft"), *SIGHT, "--limit", 10, "--json").json
    assert (counts["stage"], counts["rows"], counts["looked_at"], counts["sample"]) == ("sft", 40, 10, True)
    assert list(counts["tokens"]["answers"]) == ["min", "p5", "p50", "p95", "p99", "max", "mean", "sum"]
    assert counts["training"]["updates"] == 20
    assert counts["time"]["seconds"] == 5400


def test_stage_is_guessed_and_reported(tiny_data, tmp_path, guessed_time):
    rows = tmp_path / "mine.jsonl"
    rows.write_bytes(tiny_data.data("sft").read_bytes())
    ended = run_mmv("data", "stats", rows, *SIGHT, "--json")
    assert "reading as sft data" in ended.err
    assert ended.json["stage"] == "sft"
    pretraining = run_mmv("data", "stats", rows, *SIGHT, "--json", "--stage", "pretrain")
    assert "reading as sft data" not in pretraining.err
    assert pretraining.json["max_length"] == 640


def test_preview(tiny_data, tmp_path):
    page = tmp_path / "p.html"
    ended = run_mmv("data", "preview", tiny_data.data("sft"), *SIGHT, "--rows", 3, "--html", page)
    assert ended.code == 0, ended.err
    assert str(page) in ended.err
    assert ended.out.count("── ") == 3
    assert "[image 1: 64 patches]" in ended.out
    assert "<|im_end|>↵»" in ended.out
    text = page.read_text(encoding="utf-8")
    assert text.count("<section>") == 3 + 1  # the lesson
    assert text.count("data:image/png;base64,") == 3


def test_preview_as_json_from_a_row_on(tiny_data, tmp_path):
    ended = run_mmv(
        "data", "preview", tiny_data.data("sft"), *SIGHT, "--start", 39, "--html", tmp_path / "p.html", "--json"
    )
    page = ended.json
    assert [row["place"].rsplit(":", 1)[1] for row in page["rows"]] == ["39", "40"]
    assert all(row["used"] and len(row["input_ids"]) == row["tokens"] for row in page["rows"])
    beyond = run_mmv("data", "preview", tiny_data.data("sft"), *SIGHT, "--start", 41, "--html", tmp_path / "q.html")
    assert beyond.code == 2
    assert "has only 40 rows" in beyond.error
    assert not (tmp_path / "q.html").exists()


def test_broken_rows_end_nothing(tmp_path, guessed_time):
    rows = write_rows(tmp_path / "sft.jsonl", ["{", {"conversations": 3}])
    shown = run_mmv("data", "preview", rows, *SIGHT, "--html", tmp_path / "p.html")
    assert shown.code == 0
    assert shown.out.count("skipped: ") == 2
    counted = run_mmv("data", "stats", rows, *SIGHT)
    assert counted.code == 1
    assert "sft.jsonl:1: not JSON" in counted.error


def test_missing_things_are_named(tmp_path, tiny_data):
    for command in ("stats", "preview"):
        assert "no data file" in run_mmv("data", command, tmp_path / "none.jsonl", *SIGHT).error
        ended = run_mmv("data", command, tiny_data.data("sft"), *SIGHT[:2], "--tokenizer", tmp_path)
        assert "no tokenizer in" in ended.error


def test_preview_goes_beside_where_one_stands(tiny_data, tmp_path):
    ended = installed("data", "preview", tiny_data.data("sft"), *SIGHT, "--rows", 1, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert tree(tmp_path) == ["preview.html"]


def test_the_tokenizer_decides_the_layout_the_lengths_and_the_images(tiny_data, tmp_path, guessed_time, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = (tiny_data.data("sft"), "--tokenizer", thinking_tokenizer(tmp_path / "tokenizer"), "--json")
    stats = run_mmv("data", "stats", *options)
    assert "256 × 256, 64 tokens per image" in stats.err
    assert (stats.json["tokens_per_image"], stats.json["max_length"]) == (64, 768)
    check = run_mmv("data", "check", *options)
    assert check.code == 0, check.err
    rows = run_mmv("data", "preview", *options, "--rows", 5, "--html", tmp_path / "p.html").json["rows"]
    assert all(picture["kept"] == 1 for row in rows for picture in row["pictures"])
    assert all(row["image_tokens"] == 64 * len(row["pictures"]) for row in rows)
    assert "What squeezing does" in (tmp_path / "p.html").read_text(encoding="utf-8")
