"""The proof of the GPU path with stand-ins on a CPU: no mistake in the script may cost time on a card."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu import report
from benchmarks.gpu.__main__ import BOTH, PARTS, RUNS, Part, TooLong, do, limit
from benchmarks.gpu.card import Card
from benchmarks.gpu.operators import count
from benchmarks.gpu.runs import StepListener
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.errors import RunError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What the script writes."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--run", "all", "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run([*command, "--budget", "850"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((out / "all.json").read_text()), (out / "all.md").read_text()


@pytest.mark.long
def test_every_part_is_done_and_no_check_fails(outputs):
    parts = outputs[0]["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {part.name: "done" for part in PARTS}
    assert not report.failures(parts)
    # Without the published numbers one part has nothing to check, and parts that only measure never have.
    unchecked = {name for name, part in parts.items() if not list(report._checks(part))}
    assert unchecked <= {"conformance", "ceilings", "material", "plans", "training", "talking", "feeding"}


@pytest.mark.long
def test_what_is_measured_is_there(outputs):
    parts = outputs[0]["parts"]
    assert parts["ceilings"]["bf16_tflops"] > 0
    assert parts["waits"]["small pretrain"]["kernels"] > 100
    read = parts["training"]["small pretrain, features read"]
    assert read["samples_s"] > 0
    plain = parts["plain"]["pretrain, fused"]
    assert plain["loss_gap"] < 1e-3
    assert plain["ratio, small pretrain, features read"] == pytest.approx(
        read["samples_s"] / plain["samples_s"], rel=0.05
    )
    assert parts["vision"]["sft, groups of 4, graph"]["images_s"] > 0
    assert parts["vision"]["stored by a thread"]["images_s"] > 0
    assert parts["steps"]["small pretrain, graph"]["median_ms"] > 0
    assert parts["talking"]["1 streams, greedy, graph"]["tokens_s"] > 0
    assert set(parts["feeding"]) >= {"128² JPEG", "stored features", "448×336 JPEG"}
    assert parts["talking"]["2 streams, sampled, without slots"]["tokens_s"] > 0
    assert parts["experts"]["grouped, stored apart"]["ms"] > 0
    assert parts["compiled"]["small pretrain, compiled"]["samples_s"] > 0
    assert 0 < parts["compiled"]["small pretrain, compiled"]["busy"] <= 1
    assert parts["resident, compiled"]["pretrain, compiled"]["ms"] > 0
    assert parts["resident"]["pretrain, graph"]["loss"] == pytest.approx(parts["resident"]["pretrain, eager"]["loss"])


@pytest.mark.long
def test_the_page_names_the_card_on_every_table_and_sets_predictions_beside(outputs):
    page = outputs[1]
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == [f"## {part.name} · cpu" for part in PARTS]
    assert "| | measured | predicted |" in page


@pytest.mark.long
def test_a_part_that_breaks_or_takes_too_long_ends_nothing_else(tmp_path):
    card = Card(None, False, None, tmp_path)  # type: ignore[arg-type]
    card.__class__ = type("NoCard", (Card,), {"cuda": False})

    def breaks(card, result):
        result["before"] = 1
        raise RuntimeError("as it happens")

    def lasts(card, result):
        try:
            time.sleep(30)
        except Exception:  # what a part calls may catch all that is ordinary
            time.sleep(30)

    do(Part("breaks", 5, 5, breaks), card, 1e9)
    do(Part("lasts", 5, 0.2, lasts), card, 1e9)
    do(Part("late", 5, 5, breaks), card, 0)
    assert card.results["breaks"]["status"] == "failed: RuntimeError: as it happens"
    assert card.results["breaks"]["before"] == 1
    assert card.results["lasts"]["status"].startswith("stopped after")
    assert card.results["late"]["status"] == "not begun: no time left"
    assert report.failures(card.results) == ["breaks: failed: RuntimeError: as it happens"]


def test_a_failed_recording_ends_no_part_but_its_own(tmp_path, monkeypatch):
    """torch's allocator refuses to free its memory from then on."""

    def refuses():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuses)
    card = Card(torch.device("cuda"), True, None, tmp_path)
    do(Part("next", 5, 5, lambda card, result: None), card, 1e9)
    assert card.results["next"]["status"] == "done"


def test_a_listener_that_has_stopped_its_run_is_asked_no_more():
    """On a card the step behind is launched by then, and is reported too."""
    asked = []
    listener = StepListener(lambda metrics: asked.append(metrics.step) or metrics.step == 2)
    listener.run = SimpleNamespace(total=9)
    for step in (1, 2, 3):
        listener.step(SimpleNamespace(step=step, loss=0.5), False)
    assert (asked, listener.run.total, listener.losses) == ([1, 2], 2, [0.5] * 3)


def test_two_runs_of_440_seconds_have_all_parts_but_one():
    expected = {part.name: part.expected for part in PARTS}
    assert [sum(expected[name] for name in RUNS[run]) <= 440 for run in ("gpu", "more")] == [True, True]
    assert all(part.expected <= part.limit for part in PARTS)
    assert set(RUNS["gpu"]) & set(RUNS["more"]) == set(BOTH)
    assert set(expected) - set(RUNS["gpu"]) - set(RUNS["more"]) == {"resident, compiled"}


def test_the_page_of_two_runs_says_what_neither_had_time_for():
    head = {"card": "C", "date": "2026-01-01", "torch": "T"}
    gpu = head | {"seconds": 400.0, "left_out": ["b", "c"], "parts": {"start": {"status": "done", "x": 1}}}
    more = head | {
        "seconds": 100.0,
        "left_out": ["c"],
        "parts": {"start": {"status": "done", "x": 2}, "b": {"status": "done"}},
    }
    whole = report.together([gpu, more])
    assert whole["seconds"] == 500
    assert list(whole["parts"]) == ["start", "b"]
    assert whole["parts"]["start"]["x"] == 1
    assert "Left out for time: c." in report.markdown(whole)
    with pytest.raises(RunError, match="card is C, and D"):
        report.together([gpu, more | {"card": "D"}])


@pytest.mark.long
@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")
def test_operators_of_an_update_are_counted_in_the_code_of_a_gpu():
    counts = count("moe", "all")
    layers = PRESETS["moe"].num_hidden_layers
    assert counts["stacked"] == 3 * layers
    assert counts["_grouped_mm"] == 9 * layers, "three products, each with two gradients"
    assert counts["rms_norm"] == counts["rms_norm_backward"] == 2 * layers + 1
    assert not {"bincount", "index_put"} & set(+counts), "what waits or sorts"
    assert counts.total() < 2000


def test_a_failed_check_is_reported_and_no_ratio_is_printed_without_agreement():
    parts = {"plain": {"status": "done", "pretrain": {"agrees": False, "checks": {"both sides": False}}}}
    assert report.failures(parts) == ["plain: both sides"]
    summary = {"card": "C", "date": "D", "torch": "T", "seconds": 1.0, "parts": parts}
    assert "- **failed** plain: both sides" in report.markdown(summary)


def test_the_limit_ends_with_the_part():
    with pytest.raises(TooLong), limit(0.05):
        time.sleep(5)
    with limit(0.3):
        pass
    time.sleep(0.4)
