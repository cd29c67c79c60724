"""`mmv plan`: what it predicts is what happens."""

from __future__ import annotations

import json
import time

import pytest

from minimind_v.core.data.feature_cache import FeatureEncoder
from tests.cli.harness import here, place, read_rows, tree

NAME = "pretrain_vlm_128"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run that was foretold."""
    folder = tmp_path_factory.mktemp("planned") / "out"
    _, *line = place().train(folder, epochs=2, accumulate=2)
    told = here("plan", *line, "--price-per-hour", "3.6", "--json").json
    assert tree(folder) == [f"{NAME}/forecast.json"], "it leaves nothing else"
    assert json.loads((folder / NAME / "forecast.json").read_text()) == told
    assert here("train", *line).code == 0
    return folder


def test_what_can_be_counted_is_exact(out):
    told, last = (out / NAME / "forecast.json"), read_rows(out / NAME / "metrics.jsonl")[-1]
    found = json.loads(told.read_text())
    assert (found["updates"], found["samples"]) == (last["step"], last["samples"]) == (10, 80)
    assert (found["tokens"], found["supervised_tokens"]) == (last["tokens"], last["supervised_tokens"])
    assert found["cost"] == pytest.approx(0.001 * found["seconds"])
    assert found["stage"] == "pretrain"


def test_what_is_measured_is_of_the_right_size(out):
    found = json.loads((out / NAME / "forecast.json").read_text())
    last = read_rows(out / NAME / "metrics.jsonl")[-1]
    assert last["seconds"] / 5 < found["seconds"] < 5 * last["seconds"]
    disk = sum((out / path).stat().st_size for path in tree(out))
    assert found["disk_bytes"] == pytest.approx(disk, rel=0.3)
    assert found["memory_bytes"] > 10**8


def test_the_report_sets_it_beside_what_happened(out):
    page = (out / NAME / "report.html").read_text()
    assert "Forecast and actual" in page
    for name in ("steps", "tokens", "time", "memory", "disk", "cost"):
        assert f"<td>{name}</td>" in page
    assert "other settings" not in page


def test_the_report_says_where_the_plan_was_for_something_else(out):
    _, *line = place().train(out, epochs=2, accumulate=2, lr=1e-5)
    assert here("train", *line, "--overwrite").code == 0
    assert "The forecast had other settings: lr." in (out / NAME / "report.html").read_text()


def test_it_needs_no_base_and_says_all_in_words(tmp_path):
    _, _, *line = place().train(tmp_path, "sft", init=tmp_path / "none.pth", max_steps=3, gpus=2)
    ended = here("plan", "sft", *line)
    assert ended.code == 0, ended.err
    rows = dict(row.split(maxsplit=1) for row in ended.out.splitlines())
    assert rows["steps"] == "3"
    assert rows["samples"] == "24"
    assert "2 processes assumed to be 2 times as fast" in rows["how"]
    assert "cost" not in rows


def test_later_epochs_do_not_look_again(tmp_path, monkeypatch):
    encode = FeatureEncoder.encode

    def slowly(encoder, images):
        time.sleep(0.05 * len(images))
        return encode(encoder, images)

    monkeypatch.setattr(FeatureEncoder, "encode", slowly)
    seconds = {}
    for choice in ("exact", "off"):
        _, *line = place().train(tmp_path / choice, epochs=5, features=choice)
        told = here("plan", *line, "--json").json
        assert ("with the features cached" in told["how"]) == (choice == "exact")
        seconds[choice] = told["seconds"]
    looking = 0.05 * 40  # of an epoch
    assert seconds["exact"] > looking
    assert seconds["off"] - seconds["exact"] > 3 * looking


def test_mistakes_are_one_line(tmp_path):
    _, _, *line = place().train(tmp_path)
    assert here("plan", "plan", *line).code == 2
    assert here("train", "pretrain", *line, "--price-per-hour", "2").code == 2
    assert "no data file" in here("plan", "--data", "none.jsonl", *line[4:]).error
    assert tree(tmp_path) == []
