"""What a run leaves besides weights: manifest, events, report, and curves elsewhere."""

from __future__ import annotations

import builtins
import json
import re
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import minimind_v
from minimind_v.core.formats.inventory import list_runs
from minimind_v.core.monitor.manifest import git_state
from minimind_v.core.pages.run_report import beside, read_run
from tests.cli.harness import read_rows, run_mmv, tiny_data, write_rows
from tests.conftest import interrupt_at

NAME = "pretrain_vlm_128"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A short run, stopped on the way and resumed, with a warning and validations."""
    folder = tmp_path_factory.mktemp("run") / "out"
    line = tiny_data().train(folder, epochs=3, lr=0.9, val_every=6, save_every=5, track="tensorboard")
    assert run_mmv(*line).code == 0
    return folder


def manifest(out):
    return json.loads((out / NAME / "manifest.json").read_text())


# --- manifest ---------------------------------------------------------------------------------------------------------


def test_the_manifest_holds_the_inputs_of_the_run(out):
    record = manifest(out)
    assert record["seed"] == 1
    assert record["config"]["data"]["batch_size"] == 4
    assert set(record["fingerprints"]) == {"data.file", "data.images", "data.tokenizer", "vision_model", "init"}
    assert all(re.search(r"\d+ (bytes|files) [0-9a-f]{16}", text) for text in record["fingerprints"].values())
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["mmv"] == minimind_v.__version__
    start = record["starts"][0]
    assert "train pretrain --preset demo" in start["command"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", start["time"])
    assert start["after_updates"] == 0
    assert start["processes"] == 1


@pytest.mark.long
def test_a_resumed_run_adds_a_start(tmp_path, monkeypatch):
    line = tiny_data().train(tmp_path, save_every=2)
    interrupt_at(monkeypatch, 5)
    assert run_mmv(*line).code == 130
    monkeypatch.undo()
    assert run_mmv(*line, "--resume").code == 0
    assert [start["after_updates"] for start in manifest(tmp_path)["starts"]] == [0, 4]
    assert run_mmv(*line, "--overwrite").code == 0
    assert len(manifest(tmp_path)["starts"]) == 1


def test_code_outside_a_repository_has_no_git_state(tmp_path):
    (tmp_path / "__init__.py").touch()
    assert git_state(tmp_path) is None


# --- report -----------------------------------------------------------------------------------------------------------


def test_the_report_is_one_file_with_everything(out):
    page = (out / NAME / "report.html").read_text()
    assert page.count("<polyline") >= 9
    for phrase in ("is too high", "Learning rate", "Gradient norm", "Tokens per second", "validation", "Starts"):
        assert phrase in page
    assert "data.batch_size" in page
    assert not re.search(r'(src|href)="(?!data:)|@import|<script|url\(', page), "it needs nothing besides itself"
    assert "NaN" not in page
    assert "nan," not in page


def test_the_report_is_made_again_on_demand(out, tmp_path):
    page = out / NAME / "report.html"
    before = page.read_text()
    page.unlink()
    for target in (out, out / NAME, out / f"{NAME}.pth"):
        assert run_mmv("report", target).out == f"{page}\n"
    assert page.read_text() == before
    assert run_mmv("report", out, "--json").json == {"report": str(page)}
    assert "no run in" in run_mmv("report", tmp_path).error


def test_the_report_of_a_run_is_made_by_the_name_that_runs_shows(tmp_path, monkeypatch):
    step = {"step": 1, "steps": 9, "loss": 1.0, "samples": 4, "seconds": 1.0}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "metrics.jsonl", [step])
    monkeypatch.setenv("MMV_OUT", str(tmp_path))
    assert run_mmv("report", "second").out == f"{tmp_path / 'second' / 'report.html'}\n"
    assert "no run in third" in run_mmv("report", "third").error


def test_the_report_of_a_run_under_way(out, tmp_path):
    lines = (out / NAME / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:1]) + lines[1][:20])
    assert run_mmv("report", tmp_path).code == 0
    assert "1 of 27 steps" in (tmp_path / "report.html").read_text()
    (tmp_path / "metrics.jsonl").write_text("")
    assert "logged nothing yet" in run_mmv("report", tmp_path).error


def test_a_run_that_is_killed_between_two_logged_steps_has_come_to_its_last_save(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 6)
    assert run_mmv(*tiny_data().train(tmp_path, save_every=2, log_every=100)).code == 130
    events = tmp_path / NAME / "events.jsonl"
    kept = [event for event in read_rows(events) if "saved" in event]
    assert [event["step"] for event in kept] == [2, 4]
    write_rows(events, kept)  # a kill leaves no more
    assert [entry.steps for entry in list_runs(tmp_path)] == [4]
    assert run_mmv("report", tmp_path).code == 0
    page = (tmp_path / NAME / "report.html").read_text()
    assert "4 of 10 steps, not finished, epoch 0.40" in page


@pytest.mark.parametrize(
    ("logged", "headline"),
    [
        ({1: 14.6, 20: 2.4, 40: 0.5, 46: 0.25}, "<b>0.2500</b>loss of the last logged step<"),
        ({n: n / 100 for n in range(0, 401, 20)}, "<b>3.8000</b>mean loss of the last 3 logged steps<"),
        ({n: n for n in range(1, 1001)}, "<b>995.5000</b>mean loss of the last 10 logged steps<"),
        ({0: 2.0}, "<b>2.0000</b>loss of the last logged step<"),
    ],
)
def test_the_loss_above_a_report_is_that_of_its_last_steps_alone(tmp_path, logged, headline):
    write_rows(
        tmp_path / "metrics.jsonl",
        [{"step": step, "loss": loss, "samples": step, "seconds": step} for step, loss in logged.items()],
    )
    assert run_mmv("report", tmp_path).code == 0
    assert headline in (tmp_path / "report.html").read_text()


def test_what_a_row_or_a_path_says_does_nothing_in_the_report(tmp_path):
    folder = tmp_path / "<script>x"
    ended = run_mmv(*tiny_data().train(folder, max_steps=2))
    assert ended.code == 0
    assert "<script" not in (folder / NAME / "report.html").read_text()


def test_memory_is_kept(out):
    assert max(event.get("memory_bytes", 0) for event in read_rows(out / NAME / "events.jsonl")) > 10**8
    assert beside(read_run(out / NAME)) == [], "nothing was foretold"


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_tensorboard_shows_the_same_curves(out):
    events = EventAccumulator(str(out / NAME / "tensorboard")).Reload()
    logged = read_rows(out / NAME / "metrics.jsonl")
    for key, tag in (("loss", "train/loss"), ("lr", "train/lr"), ("grad_norm", "train/grad_norm")):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (record["step"], pytest.approx(record[key], rel=1e-6)) for record in logged
        ]
    assert [event.step for event in events.Scalars("validation/loss")] == [6, 12, 18, 24, 27]


class FakeRun:
    id, url = "abc123", "http://nowhere"

    def __init__(self, calls):
        self.calls = calls

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for both services; what they are told."""
    recorded = []
    wandb = types.ModuleType("wandb")
    wandb.api = types.SimpleNamespace(api_key=None)
    wandb.init = lambda **settings: recorded.append(("init", settings)) or FakeRun(recorded)
    trackio = types.ModuleType("trackio")
    trackio.init = lambda **settings: recorded.append(("init", settings))
    trackio.log, trackio.finish = FakeRun(recorded).log, FakeRun(recorded).finish
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return recorded


def test_wandb_works_offline_without_an_account_and_resumes_the_same_run(tmp_path, calls):
    ended = run_mmv(*tiny_data().train(tmp_path, max_steps=3, track="wandb"))
    assert ended.code == 0, ended.err
    assert "wandb sync" in ended.err
    _, settings = calls[0]
    assert (settings["mode"], settings["id"], settings["resume"]) == ("offline", None, None)
    assert settings["config"]["data"]["batch_size"] == 4
    assert [call[1] for call in calls[1:-1]] == [1, 2, 3]
    assert calls[1][2]["train/loss"] > 0
    assert calls[-1] == ("finish",)
    calls.clear()
    line = tiny_data().train(tmp_path, max_steps=4, track="wandb")
    assert run_mmv(*line, "--resume", "--allow", "max_steps").code == 0
    assert (calls[0][1]["id"], calls[0][1]["resume"]) == ("abc123", "allow")
    assert [call[1] for call in calls[1:-1]] == [4]


def test_trackio(tmp_path, calls):
    assert run_mmv(*tiny_data().train(tmp_path, max_steps=2, track="trackio")).code == 0
    assert [call[0] for call in calls] == ["init", "log", "log", "finish"]
    assert calls[0][1]["name"] == NAME


def test_a_tracker_that_breaks_does_not_end_the_run(tmp_path, calls, monkeypatch):
    def broken(values, step):
        raise OSError("no route to host")

    monkeypatch.setattr(sys.modules["trackio"], "log", broken)
    ended = run_mmv(*tiny_data().train(tmp_path, max_steps=3, track="trackio"))
    assert ended.code == 0
    assert ended.err.count("no route to host") == 1


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch, kind):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name.split(".")[0] == kind or name == "torch.utils.tensorboard":
            raise ModuleNotFoundError(f"No module named {kind!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setitem(sys.modules, kind, None)
    ended = run_mmv(*tiny_data().train(tmp_path / "out", max_steps=2, track=kind))
    assert ended.code == 1
    assert f"pip install 'minimind-v[{kind}]'" in ended.error
    assert not (tmp_path / "out" / NAME).exists()
    assert "did you mean 'wandb'" in run_mmv(*tiny_data().train(tmp_path / "out", track="wandbb")).error
