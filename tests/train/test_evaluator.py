"""Evaluation by a task during a run: it measures what `mmv eval` measures, and leaves no trace in training."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minimind_v.core.config.load import build_config
from minimind_v.core.evaluate import by_task
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.monitor.diagnostics import Start
from minimind_v.core.monitor.metrics import Best, Listener, TaskScores
from minimind_v.core.monitor.recorder import Recorder
from minimind_v.core.pages.run_report import read_run, report_page
from minimind_v.core.train import evaluator
from minimind_v.core.train.run import assemble, train
from tests.cli.harness import SIGHT, Running, in_forks, installed, read_rows, run_mmv, sighted, tiny_data, write_rows
from tests.conftest import train_until_killed

NAME = "sft_vlm_128"


def line(out, **changes):
    """A run of six steps that measures eight questions at steps 0, 4 and 6."""
    asked = {"eval_every": 4, "eval_task": "loss", "eval_data": tiny_data().data("sft"), "eval_limit": 8}
    short = {"init": sighted(), "max_steps": 6, "lr": 2e-3, "features": "off", "best_by": "loss"}
    return tiny_data().train(out, "sft", **short | asked | changes)


def without_evaluation(out, **changes):
    nothing = dict.fromkeys(("eval_every", "eval_task", "eval_data", "eval_limit", "best_by"))
    return line(out, **nothing | changes)


def events(out, kind):
    return [event[kind] for event in read_rows(out / NAME / "events.jsonl") if kind in event]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    encoded, encode = [], by_task.Images.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_task.Images, "encode", lambda *args: encoded.append(args[1]) or encode(*args))
        ended = run_mmv(*line(folder))
    assert ended.code == 0, ended.err
    (folder / "said").write_text(ended.err)
    (folder / "encoded").write_text(" ".join(encoded))
    return folder


def test_the_weights_are_measured_before_the_first_step_every_n_steps_and_after_the_last(out):
    assert [scores["step"] for scores in events(out, "evaluation")] == [0, 4, 6]
    for scores in events(out, "evaluation"):
        assert scores["rows"] == 8
        assert scores["blank"] - scores["value"] == pytest.approx(scores["visual_gain"]["blank"]["value"])
        assert len(read_rows(out / NAME / "eval" / f"step-{scores['step']:010d}" / "predictions.jsonl")) == 4 * 8
    assert (out / "said").read_text().count(", gain ") == 3
    assert (out / "said").read_text().count("--eval-data are the training rows of") == 1


def test_an_evaluation_changes_no_bit_of_training(out, tmp_path):
    assert run_mmv(*without_evaluation(tmp_path / "plain")).code == 0
    evaluated, plain = (read_rows(folder / NAME / "metrics.jsonl") for folder in (out, tmp_path / "plain"))
    assert [record["loss"] for record in evaluated] == [record["loss"] for record in plain]
    assert (out / f"{NAME}.pth").read_bytes() == (tmp_path / "plain" / f"{NAME}.pth").read_bytes()


def test_the_images_are_encoded_once_for_all_evaluations_of_a_run(out):
    encoded = (out / "encoded").read_text().split()
    assert len(encoded) == len(set(encoded)) == events(out, "evaluation")[0]["pictures"] + 1  # the blank one


def test_the_figures_are_those_of_mmv_eval(out, tmp_path):
    data = ("--data", tiny_data().data("sft"), "--limit", 8, "--out", tmp_path / "same", "--device", "cpu")
    report = run_mmv("eval", "--task", "loss", "--model", out / f"{NAME}.pth", *data, *SIGHT, "--json").json
    last = events(out, "evaluation")[-1]
    assert last["metrics"][0]["value"] == pytest.approx(report["metrics"][0]["value"], rel=2e-3)  # of half precision
    assert last["metrics"][0]["n"] == report["metrics"][0]["n"]
    assert last["visual_gain"]["blank"]["value"] == pytest.approx(report["visual_gain"]["blank"]["value"], abs=2e-3)


def test_the_weights_with_the_lowest_loss_are_kept_and_named(out):
    values = [scores["value"] for scores in events(out, "evaluation")]
    steps = [scores["step"] for scores in events(out, "evaluation") if scores["best"]]
    best = events(out, "best")[-1]
    assert [kept["step"] for kept in events(out, "best")] == steps
    assert (best["value"], best["step"]) == (min(values), (0, 4, 6)[values.index(min(values))])
    assert len(read_checkpoint(out / f"{NAME}_best.pth").tensors) == 41
    assert (
        f"best weights: {out / NAME}_best.pth, of step {best['step']} (loss on 8 questions of"
        in (out / "said").read_text()
    )
    assert f"or with the best: mmv chat --model {out / NAME}_best.pth" in (out / "said").read_text()


def test_best_weights_are_chosen_by_the_value_that_is_named():
    first, second = Best(4, "f1", 0.5, lower_is_better=False), Best(8, "f1", 0.6, lower_is_better=False)
    assert second.beats(first)
    assert not first.beats(second)
    assert not first.beats(first)
    assert first.beats(replace(second, by="f1 of other questions"))
    assert first.beats(None)
    assert Best(1, "loss", 0.5).beats(Best(2, "loss", 0.6))


def test_the_page_of_the_run_draws_what_the_images_add(out):
    page = report_page(read_run(out / NAME))
    assert "Does it look? loss on" in page
    assert page.count("<polygon") == 2
    assert "Gain by the image, in loss" in page


GAIN = {"value": 0.2, "ci_low": 0.1, "ci_high": 0.3}


@pytest.mark.parametrize(
    ("lows", "said"),
    [
        ([-0.1, 0.1, 0.2], "From this step on the model uses its images: <b>step 10</b>"),
        ([0.1, -0.1, 0.2], "<b>step 20</b>"),
        ([0.1, 0.1, 0.2], "From the first evaluation on the model uses its images: <b>step 0</b>"),
        ([0.1, 0.1, -0.2], "do not show"),
        ([None, None, None], "do not show"),
    ],
)
def test_the_page_names_the_step_from_which_on_all_intervals_are_above_0(out, lows, said):
    scores = events(out, "evaluation")[0] | {"data": "pairs"}
    measured = [
        {"step": 10 * n, "evaluation": scores | {"visual_gain": {"blank": GAIN | {"ci_low": low}}}}
        for n, low in enumerate(lows)
    ]
    run = read_run(out / NAME)
    assert said in report_page(replace(run, events=[], watched=measured))


def test_a_damaged_evaluation_is_named_and_left_out(out, tmp_path):
    scores = events(out, "evaluation")[0]
    gains = {"visual_gain": {"blank": GAIN | {"value": "much"}}}
    lines = [scores, scores | {"visual_gain": {}}, scores | gains, scores | {"value": []}, {"task": 5} | scores, 7]
    del lines[4]["blank"]
    (tmp_path / "metrics.jsonl").write_bytes((out / NAME / "metrics.jsonl").read_bytes())
    text = "".join(f"{by_task.as_json({'step': 3, 'evaluation': entry})}\n" for entry in lines)
    (tmp_path / "evaluations.jsonl").write_text(text)
    run = read_run(tmp_path)
    assert [trouble.split(": ", 1)[1] for trouble in run.damaged] == [
        "evaluation: no visual_gain over blank", "evaluation: value is 'much'", "evaluation: value is a list",
        "evaluation: no blank", "evaluation: no mapping",
    ]  # fmt: skip
    assert list(run.evaluations.values()) == [[scores | {"step": 3}]]
    assert "Does it look?" in report_page(run)


def test_a_tracker_receives_the_figures(out, tmp_path):
    scores, logged = TaskScores(**events(out, "evaluation")[0] | {"step": 0}), []
    recorder = Recorder(tmp_path / "events.jsonl", Listener())
    recorder.begin(Start(build_config("sft"), True, False, None, 40))
    recorder._tracker = SimpleNamespace(log=lambda step, values: logged.append((step, values)))
    recorder.evaluated(scores)
    names = {"evaluation/loss": scores.value, "evaluation/loss_blank": scores.blank}
    assert logged == [(0, names | {"evaluation/visual_gain": scores.gain["value"]})]


# --- interruptions and errors -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, events):
    words = line(tmp_path / "out")
    options = {name[2:].replace("-", "_"): value for name, value in zip(words[2::2], words[3::2], strict=True)}
    return assemble(build_config("sft", options=options), events)


def test_a_stopped_evaluation_leaves_training_as_it_was(run):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run.train_step.model.train()
    assert run.evaluator(4, lambda: True) is None
    assert run.train_step.model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(run.evaluator(4, lambda: False), TaskScores)
    assert run.train_step.model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_the_vision_encoder_is_hashed_once_for_all_evaluations_of_a_run(run, monkeypatch):
    hashed = []
    monkeypatch.setattr(by_task, "crc32", lambda tensor: hashed.append(tensor) or 0)
    assert isinstance(run.evaluator(4, lambda: False), TaskScores)
    names = run.train_step.model.state_dict()
    assert len(hashed) == sum(not name.startswith("vision_encoder.") for name in names) < len(names)


def test_answers_that_cannot_be_written_cost_the_evaluation_and_not_the_run(tmp_path, events):
    words = line(tmp_path / "out", max_steps=1)
    options = {name[2:].replace("-", "_"): value for name, value in zip(words[2::2], words[3::2], strict=True)}
    run = assemble(build_config("sft", options=options), events)
    run.evaluator.folder.evaluations = tmp_path / "file" / "eval"
    (tmp_path / "file").write_text("")
    assert run.run().steps == 1
    assert [warning.split(":")[:2] for warning in events.warnings if "not evaluated" in warning] == [
        ["step 0", " not evaluated"], ["step 1", " not evaluated"],
    ]  # fmt: skip


def test_quiet_does_not_hide_that_evaluations_were_not_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluator, "predictions_of", lambda folder, step: tmp_path / "file" / f"step-{step}")
    ended = run_mmv(*line(tmp_path / "out", max_steps=1), "--quiet")
    assert ended.code == 0
    assert [lost.split(": not evaluated: ")[0] for lost in ended.err.splitlines()] == ["step 0", "step 1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_task": None, "eval_data": None}, "--eval-every needs --eval-task and --eval-data"),
        ({"eval_every": None}, "--eval-task and --eval-data without --eval-every"),
        ({"best_by": "validation"}, "--best-by validation needs --val-every"),
        ({"best_by": "los"}, "(did you mean 'loss'?)"),
        ({"eval_task": "vqaa"}, "no task 'vqaa' (did you mean 'vqa'?)"),
        ({"eval_limit": 0}, "--eval-limit must be at least 1"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, changes, message):
    ended = run_mmv(*line(tmp_path / "out", **changes))
    assert ended.code == 2
    assert message in ended.error
    assert not (tmp_path / "out").exists()


def test_all_that_is_missing_is_named_at_once(tmp_path):
    changes = {"data": "rows.jsonl", "images": None, "eval_data": "asked.jsonl", "eval_images": "shown.zip"}
    changes |= {"eval_task": "mine.yaml"}
    ended = run_mmv(*line(tmp_path / "out", **changes))
    assert "4 inputs are missing" in ended.error
    assert all(name in ended.error for name in ("rows.jsonl", "asked.jsonl", "shown.zip", "mine.yaml"))


def test_questions_that_a_task_cannot_use_are_refused_before_the_first_step(tmp_path):
    ended = run_mmv(*line(tmp_path / "out", eval_task="choice", best_by=None))
    assert ended.code == 1
    assert "no question for the task choice" in ended.error
    assert not (tmp_path / "out" / NAME / "metrics.jsonl").exists()


def test_images_that_are_missing_are_named_with_their_option_before_anything_is_written(tmp_path):
    alone = write_rows(tmp_path / "alone.jsonl", ["{", *read_rows(tiny_data().data("sft"))[:2]])
    ended = run_mmv(*line(tmp_path / "out", eval_data=alone))
    assert ended.code == 1
    assert ended.error == f"{alone}: its rows name images — give their folder, zip or tar with --eval-images"
    assert not (tmp_path / "out").exists()


def test_a_run_ends_early_and_evaluates_after_a_resume(tmp_path, events, monkeypatch):
    """A signal during the evaluation of step 1 skips it; the resumed run begins with it."""
    words = line(tmp_path / "out", max_steps=2, eval_every=1, eval_limit=2)
    options = {name[2:].replace("-", "_"): value for name, value in zip(words[2::2], words[3::2], strict=True)}
    config = build_config("sft", options=options)
    first = assemble(config, events)
    evaluate = first.evaluator.__class__.__call__

    def interrupted(evaluator, step, stopped):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(evaluator, step, stopped)

    with monkeypatch.context() as patch:
        patch.setattr(first.evaluator.__class__, "__call__", interrupted)
        assert first.run().stopped_by is signal.SIGTERM
    assert [scores.step for scores in events.evaluations] == [0]
    summary = train(config, events, resume=True)
    assert [scores.step for scores in events.evaluations] == [0, 1, 2]
    assert summary.best is not None


# --- long -------------------------------------------------------------------------------------------------------------


def figures(out):
    """All evaluations, without what differs between two runs of the same numbers."""
    volatile = {"seconds", "predictions"}
    return [{key: scores[key] for key in scores.keys() - volatile} for scores in events(out, "evaluation")]


def stay_in_the_third_evaluation():
    measure = evaluator.measure

    def begin(*args, progress, **options):
        begun.append(progress)

        def report(done, total):
            progress(done, total)
            if len(begun) == 3 and done:
                time.sleep(600)

        return measure(*args, progress=report, **options)

    begun, evaluator.measure = [], begin


@pytest.mark.long
def test_a_run_killed_during_an_evaluation_resumes_to_the_same_end(tmp_path):
    changes = {"max_steps": 7, "eval_every": 2, "eval_task": "vqa", "best_by": "exact", "save_every": 3}
    whole, killed = line(tmp_path / "whole", **changes), line(tmp_path / "killed", **changes)
    assert run_mmv(*whole).code == 0
    run = Running(tmp_path, *killed, prepare=stay_in_the_third_evaluation)
    run.until((tmp_path / "killed" / NAME / "eval" / "step-0000000004" / ".replies.jsonl").exists)
    run.send(signal.SIGKILL).wait()
    ended = run_mmv(*killed, "--resume")
    assert ended.code == 0, ended.err
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    assert events(tmp_path / "killed", "best") == events(tmp_path / "whole", "best")
    for name in (f"{NAME}.pth", f"{NAME}_best.pth"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.long
def test_a_resumed_run_knows_the_best_of_its_own_measure_only(tmp_path):
    words = line(tmp_path / "out", save_every=2, eval_every=2)
    train_until_killed(5, words)
    before = events(tmp_path / "out", "best")
    ended = run_mmv(*words, "--resume", "--best-by", "perplexity")
    assert ended.code == 0, ended.err
    after = events(tmp_path / "out", "best")
    assert after[: len(before)] == before
    assert after[len(before)]["by"].startswith("loss perplexity on 8 questions")


@pytest.mark.long
def test_a_run_without_evaluation_imports_no_statistics(tmp_path):
    plain = " ".join(map(str, without_evaluation(tmp_path / "plain", max_steps=1)))
    evaluated = " ".join(map(str, line(tmp_path / "evaluated", max_steps=1)))
    outcomes = in_forks(plain, evaluated)
    assert [ended.code for ended, _ in outcomes.values()] == [0, 0]
    of_plain, of_evaluated = (modules for _, modules in outcomes.values())
    assert "scipy" in of_evaluated
    assert "scipy" not in of_plain
    assert "minimind_v.core.train.evaluator" not in of_plain


@pytest.mark.long
def test_one_of_several_processes_evaluates(tmp_path):
    two = {"batch_size": 2, "gpus": 2}
    lines = [line(tmp_path / "with", **two), without_evaluation(tmp_path / "plain", **two)]
    assert [ended.err for ended in (installed(*words) for words in lines) if ended.code] == []
    assert [scores["step"] for scores in events(tmp_path / "with", "evaluation")] == [0, 4, 6]
    assert (tmp_path / "with" / f"{NAME}.pth").read_bytes() == (tmp_path / "plain" / f"{NAME}.pth").read_bytes()
