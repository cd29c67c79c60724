"""`mmv plan`: what it predicts is what happens."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest

from minimind_v.core.config.load import build_config
from minimind_v.core.data.feature_cache import FeatureEncoder
from minimind_v.core.monitor.metrics import TaskScores
from minimind_v.core.pages.run_report import beside, read_run
from minimind_v.core.train import forecast
from minimind_v.core.train.forecast import Stopwatch, evaluation_time
from tests.cli.harness import read_rows, run_mmv, tiny_data, tree

NAME = "pretrain_vlm_128"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run that was foretold; both count the time of this process only, not that of a busy machine's others."""
    folder = tmp_path_factory.mktemp("planned") / "out"
    _, *line = tiny_data().train(folder, epochs=2, accumulate=2, features="exact")
    with mock.patch.object(time, "perf_counter", time.process_time):
        report = run_mmv("plan", *line, "--price-per-hour", "3.6", "--json").json
        assert tree(folder) == [f"{NAME}/forecast.json"], "it leaves nothing else"
        assert json.loads((folder / NAME / "forecast.json").read_text()) == report
        assert run_mmv("train", *line).code == 0
    return folder


def test_what_can_be_counted_is_exact(out):
    path, last = (out / NAME / "forecast.json"), read_rows(out / NAME / "metrics.jsonl")[-1]
    report = json.loads(path.read_text())
    assert (report["updates"], report["samples"]) == (last["step"], last["samples"]) == (10, 80)
    assert (report["tokens"], report["supervised_tokens"]) == (last["tokens"], last["supervised_tokens"])
    assert report["cost"] == pytest.approx(0.001 * report["seconds"])
    assert report["stage"] == "pretrain"


def test_the_time_of_evaluations_is_that_of_all_questions_and_the_first_one_encodes_the_images():
    watch = Stopwatch()
    watch.run = SimpleNamespace(evaluator=SimpleNamespace(available=1000))
    for seconds in (3.0, 1.0):
        watch.evaluated(TaskScores(0, "vqa", "d", 32, 1, "vqa", 0.5, None, None, None, {}, [], "p", seconds))
    config = replace(build_config("sft"), eval_every=4)
    seconds, how = evaluation_time(config, watch, steps=10)
    assert seconds == (3 + 3 * 1) * 200 / 32, "before the first step, after steps 4 and 8, and after the last"
    assert "4 evaluations of 200 questions, measured on 32 of them" in how
    assert evaluation_time(replace(config, eval_limit=64), watch, steps=8)[0] == (3 + 2 * 1) * 64 / 32
    watch.run.evaluator = None
    assert evaluation_time(config, watch, steps=10) == (None, "")


@pytest.mark.long
def test_evaluations_belong_to_the_time_and_the_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "QUESTIONS", 6)
    data = tiny_data().data("sft")
    asked = {"eval_every": 4, "eval_task": "loss", "eval_data": data, "max_steps": 10, "best_by": "loss"}
    asked |= {"eval_limit": 8}
    _, *line = tiny_data().train(tmp_path / "out", **asked)
    report = run_mmv("plan", *line, "--price-per-hour", "3.6", "--json").json
    assert "4 evaluations of 8 questions, measured on 6 of them" in report["how"]
    assert 0 < report["evaluation_seconds"] < report["seconds"]
    assert report["cost"] == pytest.approx(0.001 * report["seconds"])
    assert run_mmv("train", *line).code == 0
    run = read_run(tmp_path / "out" / NAME)
    measured = sum(event["evaluation"]["seconds"] for event in run.events if "evaluation" in event)
    actual = {name: value for name, _, value in beside(run)}
    assert actual["evaluation_seconds"] == measured
    assert actual["seconds"] == run.last["seconds"] + measured


def test_what_is_measured_is_of_the_right_size(out):
    report = json.loads((out / NAME / "forecast.json").read_text())
    last = read_rows(out / NAME / "metrics.jsonl")[-1]
    assert last["seconds"] / 5 < report["seconds"] < 5 * last["seconds"]
    disk = sum((out / path).stat().st_size for path in tree(out) if not path.startswith("features"))
    assert report["disk_bytes"] == pytest.approx(disk, rel=0.3)
    assert report["memory_bytes"] > 10**8


def test_the_report_sets_it_beside_what_happened(out):
    page = (out / NAME / "report.html").read_text()
    assert "Forecast and actual" in page
    for name in ("steps", "tokens", "time", "memory", "disk", "cost"):
        assert f"<td>{name}</td>" in page
    assert "other settings" not in page


def test_the_report_says_where_the_plan_was_for_something_else(out):
    _, *line = tiny_data().train(out, epochs=2, accumulate=2, features="exact", lr=1e-5)
    assert run_mmv("train", *line, "--overwrite").code == 0
    assert "The forecast had other settings: lr." in (out / NAME / "report.html").read_text()


def test_it_needs_no_base_and_says_all_in_words(tmp_path):
    init, data = tmp_path / "none.pth", tiny_data().data("sft")
    _, _, *line = tiny_data().train(tmp_path, "sft", init=init, max_steps=3, gpus=2, features="off")
    ended = run_mmv("plan", "sft", *line, "--price-per-hour", 2)
    assert ended.code == 0, ended.err
    assert ended.err.splitlines()[0] == f"sft, preset demo: data {data}, weights {init}, which do not exist yet"
    rows = dict(row.split(maxsplit=1) for row in ended.out.splitlines())
    assert rows["steps"] == "3"
    assert rows["samples"] == "24"
    assert "2 processes assumed to be 2 times as fast" in rows["how"]
    assert rows["time"].endswith(" s")
    assert "feature cache" not in ended.out, "--features off"
    assert rows["cost"].endswith(", in the currency of --price-per-hour")


def test_the_disk_for_the_features_of_all_images_is_foretold(out):
    report = json.loads((out / NAME / "forecast.json").read_text())
    stored = sum(file.stat().st_size for file in (out / "features").rglob("*.features"))
    assert report["features_bytes"] == stored > 0
    assert f"kB for each of {len(read_rows(tiny_data().data('pretrain')))} images" in report["how"]


@pytest.mark.long
def test_later_epochs_do_not_encode_again(tmp_path, monkeypatch):
    encode, encoded = FeatureEncoder.encode, []

    def count(encoder, images):
        encoded.extend(images)
        return encode(encoder, images)

    monkeypatch.setattr(FeatureEncoder, "encode", count)
    monkeypatch.setattr(time, "perf_counter", lambda: time.process_time() + 0.05 * len(encoded))  # 0.05 s an image
    seconds = {}
    for choice in ("exact", "off"):
        _, *line = tiny_data().train(tmp_path / choice, epochs=5, features=choice)
        report = run_mmv("plan", *line, "--json").json
        assert ("with the features cached" in report["how"]) == (choice == "exact")
        seconds[choice] = report["seconds"]
    encoding = 0.05 * 40  # of an epoch
    assert seconds["exact"] > encoding
    assert seconds["off"] - seconds["exact"] > 3 * encoding


def test_mistakes_are_one_line(tmp_path):
    _, _, *line = tiny_data().train(tmp_path)
    assert run_mmv("plan", "plan", *line).code == 2
    assert run_mmv("train", "pretrain", *line, "--price-per-hour", "2").code == 2
    assert "no data file" in run_mmv("plan", "--data", "none.jsonl", *line[4:]).error
    assert tree(tmp_path) == []
