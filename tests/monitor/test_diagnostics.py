"""Words with the numbers: each rule fires over a run that has its trouble, and none over a run that is well."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from minimind_v.core.config.load import build_config
from minimind_v.core.monitor import diagnostics
from minimind_v.core.monitor.diagnostics import Diagnostics, Start
from minimind_v.core.monitor.metrics import StepMetrics, Validation
from minimind_v.core.rows import archives
from tests.cli.harness import read_rows, run_mmv, sighted, tiny_data, write_rows

HEALTHY = json.loads(Path(__file__).with_name("healthy.json").read_text())  # four runs of the demo, every step
RULES = {rule.__name__ for rule in (*diagnostics.STEP_RULES, *diagnostics.VALIDATION_RULES)}


def started(stage="pretrain", **changes):
    options = {name: changes.pop(name) for name in ("lr", "freeze", "workers") if name in changes}
    config = build_config(stage, options={"preset": "demo", "lr": 1e-3} | options)
    return Start(config, **{"loaded": True, "new_projector": stage == "pretrain"} | changes)


def metrics(step, loss, norm=1.0, steps=200, seconds=None, waited=0.0):
    seconds = float(step) if seconds is None else seconds
    return StepMetrics(step, steps, step / steps, loss, 0.5, 1e-3, norm, step, step, 60 * step, seconds, waited)


def fired_rules(losses, start=None, norms=None, pictures=1, **more):
    """The rules that fire over losses, with the step at which each does."""
    watched = Diagnostics(start or started())
    watched.history.images = pictures
    fired = {}
    for step, loss in enumerate(losses, watched.history.start.done + 1):
        norm = norms[step - 1] if norms else 1.0
        fired |= dict.fromkeys(watched.step(metrics(step, loss, norm, len(losses), **more)), step)
    return fired


def held(*losses, every=20, swapped=None):
    return [Validation(n * every, loss, 0.5, swapped and loss * swapped, 10) for n, loss in enumerate(losses, 1)]


# --- silence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", HEALTHY, ids=lambda run: f"{run['name']}, {run['stage']}")
def test_nothing_is_said_over_a_healthy_run(run):
    watched = Diagnostics(started(run["stage"], lr=run["lr"]))
    watched.history.images = 1
    columns = zip(*(run[key] for key in ("loss", "grad_norm", "seconds", "data_seconds")), strict=True)
    for step, (loss, norm, seconds, waited) in enumerate(columns, 1):
        assert watched.step(metrics(step, loss, norm, len(run["loss"]), seconds, waited)) == {}
        if step % 20 == 0:  # a held-out loss that follows that of training, others as the demo's are
            held_out_loss = max(watched.history.recent, 0.02) + 0.01
            assert watched.validated(Validation(step, held_out_loss, 0.9, held_out_loss + 0.5, 50)) == {}


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_taken_for_trouble(seed):
    rng = random.Random(seed)
    slope = [2.0 + 2.5 * math.exp(-step / 300) + rng.gauss(0, 0.4) for step in range(2000)]
    assert fired_rules(slope) == {}


def test_a_resumed_run_is_not_judged_by_its_beginning():
    assert fired_rules([6.4] * 100, started(done=500)) == {}


def test_random_weights_may_guess_and_a_trained_projector_may_stay_as_it_is():
    assert fired_rules([6.4] * 100, started(loaded=False, new_projector=False)) == {}
    assert fired_rules([2.0] * 200, started("sft")) == {}


# --- each rule --------------------------------------------------------------------------------------------------------


def first_line(loss, **settings):
    """What is said of a first loss."""
    watched = Diagnostics(started("sft", **settings))
    return watched.step(metrics(1, loss))["first_loss_high"]


def test_weights_that_guess_are_reported_at_once_and_a_little_later():
    assert fired_rules([6.4, 6.3, 6.2]) == {"first_loss_high": 1}
    falling = [5.7] * 20 + [5.5] * 20 + [5.3] * 40
    assert fired_rules(falling)["loss_stays_high"] == 60
    assert fired_rules([14.9 * 0.95**step for step in range(100)]) == {"first_loss_high": 1}, "it learns"


def test_a_first_loss_says_what_is_known_about_its_cause():
    assert "it is not trained" in first_line(6.4)
    for loss in (8.0, 14.9):
        line = first_line(loss)
        assert f"the first loss is {loss:.2f} where uniform guessing gives 6.40" in line
        assert "these rows differ from its training data" in line
        assert "do not fit" not in line
        assert "not trained" not in line
        assert "is not its tokenizer" in line
    assert "tokenizer" not in first_line(14.9, same_tokenizer=True)
    assert "was trained with another tokenizer than model" in first_line(14.9, same_tokenizer=False)


def test_a_loss_that_hardly_falls_names_the_rate_and_for_few_rows_the_recipe():
    losses = [14.9 - step / 100 for step in range(100)]
    watched, warned = Diagnostics(started("sft", lr=1e-6, rows=12)), {}
    for step, loss in enumerate(losses, 1):
        warned |= watched.step(metrics(step, loss))
    assert set(warned) == {"first_loss_high", "loss_stays_high"}
    assert "raise --lr (now 1e-06), or use --recipe small-data" in warned["loss_stays_high"]
    assert fired_rules(losses, started("sft", rows=10**6)).keys() == warned.keys()


def test_few_rows_are_learnt_by_heart_and_that_is_how_it_is_called():
    falling = [2 - step / 200 for step in range(200)]
    _, line = validated(held(1.9, 1.8, 1.85, 1.9, 2.0), falling, started("sft", rows=12))["overfitting"]
    assert line.startswith("overfitting since step 40")
    assert "12 rows were memorised; answers about other images need more rows" in line
    _, line = validated(held(1.9, 1.8, 1.85, 1.9, 2.0), falling, started("sft", rows=10**5))["overfitting"]
    assert "stop now, or use more rows" in line


def test_a_learning_rate_that_makes_the_loss_diverge_is_reported():
    assert fired_rules([2 - step / 100 for step in range(100)] + [3.5] * 30) == {"learning_rate_too_high": 109}
    assert fired_rules([1.6, *[7.0] * 40]) == {"learning_rate_too_high": 21}
    assert fired_rules([1.6, *[7.0] * 10, *[1.5] * 40]) == {}, "a jump at first, soon over"


def test_a_gradient_of_zero_is_reported():
    assert fired_rules([2.0] * 30, started("sft"), norms=[1.0] * 5 + [0.0] * 25) == {"no_gradient": 25}
    assert fired_rules([2.0] * 30, started("sft"), norms=[0.0] * 10 + [1.0] + [0.0] * 19) == {}


def waits(share, seconds=100, workers=0):
    watched, warned = Diagnostics(started("sft", workers=workers)), {}
    for step in range(1, seconds + 1):
        warned |= watched.step(metrics(step, 2 - step / 1000, steps=10**6, waited=share * step))
    return warned


def test_waiting_for_data_is_reported_with_the_number_of_workers():
    assert waits(0.15) == {}
    assert waits(0.9, seconds=60) == {}, "one stretch is no habit"
    assert "raise --workers (now 0) to 1" in waits(0.3)["data_is_slow"]
    assert "30% of the time" in waits(0.3)["data_is_slow"]


@pytest.mark.parametrize(
    ("cores", "workers", "advice"),
    [
        (16, 0, "raise --workers (now 0) to 14"),
        (16, 4, "raise --workers (now 4) to 14"),
        (16, 14, "raise --workers (now 14) to 16"),
        (64, 16, "raise --workers (now 16) to 32"),
        (2, 1, "raise --workers (now 1) to 2"),
        (16, 16, "16 cores have 16 workers — smaller images or a faster disk would help"),
        (2, 4, "smaller images or a faster disk would help"),
    ],
)
def test_more_workers_are_advised_as_long_as_there_are_cores(monkeypatch, cores, workers, advice):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert advice in waits(0.3, workers=workers)["data_is_slow"]


def validated(validations, losses, start=None, steps=200):
    watched, warned = Diagnostics(start or started("sft")), {}
    for step, loss in enumerate(losses, 1):
        watched.step(metrics(step, loss, steps=steps))
        for validation in validations:
            if validation.step == step:
                warned |= {rule: (step, line) for rule, line in watched.validated(validation).items()}
    return warned


def test_overfitting_is_reported_with_the_step_of_its_start():
    falling = [2 - step / 200 for step in range(200)]
    step, line = validated(held(1.9, 1.8, 1.85, 1.9, 2.0, 2.1), falling)["overfitting"]
    assert step == 100
    assert "since step 40" in line
    assert "from 1.800 to 2.000" in line
    assert validated(held(1.9, 1.8, 1.85, 1.82, 1.9, 1.88), falling) == {}, "it goes up and down"
    assert validated(held(1.9, 1.8, 1.85, 1.9, 2.0), [2.0] * 200) == {}, "training has not become better meanwhile"
    assert validated(held(1.9, 1.800, 1.801, 1.802, 1.803), falling) == {}, "hardly"


def test_overfitting_is_reported_once_also_over_a_resumed_run():
    earlier = held(1.9, 1.8, 1.85, 1.9)
    again = Diagnostics(started("sft", done=80), warned=(), validations=earlier)
    for step in range(81, 101):
        again.step(metrics(step, 1.0))
    again.history.losses[:] = [2 - step / 50 for step in range(40)]
    assert "overfitting" in again.validated(held(1.9, 1.8, 1.85, 1.9, 2.0)[-1])
    assert again.validated(Validation(120, 2.2, 0.5, None, 10)) == {}
    assert (
        Diagnostics(started("sft", done=80), ["overfitting"], earlier).validated(Validation(100, 2.0, 0.5, None, 1))
        == {}
    )


def test_a_model_that_ignores_the_images_is_reported():
    assert "ignores_images" in validated(held(1.9, 1.8, 1.7, 1.6, swapped=1.001), [1.5] * 200)
    assert validated(held(1.9, 1.8, 1.7, 1.6, swapped=1.05), [1.5] * 200) == {}
    assert validated(held(1.9, 1.8, 1.7, swapped=1.0), [1.5] * 200, steps=2000) == {}, "it is too early"


# --- in real runs -----------------------------------------------------------------------------------------------------


def warnings(out, name="pretrain_vlm_128"):
    return {event["sign"]: event["warning"] for event in read_rows(out / name / "events.jsonl") if "sign" in event}


def run(tmp_path, stage="pretrain", *options, **changes):
    ended = run_mmv(*tiny_data().train(tmp_path / "out", stage, **changes), *options)
    assert ended.code == 0, ended.err
    warned = warnings(tmp_path / "out", f"{stage}_vlm_128")
    for line in warned.values():
        assert ended.err.count(line) == 1
    return warned


@pytest.mark.long
def test_a_real_run_with_a_huge_learning_rate(tmp_path):
    warned = run(tmp_path, lr=0.9, epochs=4)
    assert set(warned) == {"learning_rate_too_high"}
    assert "--lr 0.09" in warned["learning_rate_too_high"]


@pytest.mark.long
def test_a_real_run_with_a_tiny_learning_rate(tmp_path):
    warned = run(tmp_path, lr=1e-9, epochs=6)
    assert set(warned) == {"projector_does_not_learn"}
    assert "is 2.69 after 50" in warned["projector_does_not_learn"]


@pytest.mark.long
def test_a_real_run_whose_answers_are_cut(tmp_path):
    warned = run(tmp_path, "sft", max_length=120, init=sighted(), epochs=2)
    assert set(warned) == {"answers_are_cut"}
    assert "120 tokens — raise --max-length" in warned["answers_are_cut"]


def test_a_real_run_without_pictures(tmp_path):
    rows = [{"conversations": row["conversations"]} for row in read_rows(tiny_data().data("pretrain"))]
    for row in rows:
        row["conversations"][0]["content"] = "What is there?"
    warned = run(tmp_path, data=write_rows(tmp_path / "talk.jsonl", rows), images=None)
    assert set(warned) == {"no_pictures"}


@pytest.mark.long
def test_a_real_run_whose_rows_lack_their_marks(tmp_path):
    rows = read_rows(tiny_data().data("pretrain"))
    for number, row in enumerate(rows):
        if number % 4:
            row["conversations"][0]["content"] = "What is there?"
    warned = run(tmp_path, data=write_rows(tmp_path / "unmarked.jsonl", rows))
    assert set(warned) == {"no_marks"}
    for row in rows[: len(rows) // 2]:
        row["conversations"][0]["content"] = "<image>What is there?"
    assert run(tmp_path, "pretrain", "--overwrite", data=write_rows(tmp_path / "half.jsonl", rows)) == {}


@pytest.mark.long
def test_a_real_run_whose_pictures_come_slowly(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnostics, "STRETCH", 0.2)
    real = archives.ZipPictures.read
    monkeypatch.setattr(archives.ZipPictures, "read", lambda *args: (time.sleep(0.03), real(*args))[1])
    warned = run(tmp_path, epochs=2, lr=4e-3)
    assert set(warned) == {"data_is_slow"}


@pytest.mark.long
def test_a_real_run_that_is_well(tmp_path):
    assert run(tmp_path, epochs=6, lr=4e-3) == {}


def test_every_rule_is_made_to_happen_here():
    source = Path(__file__).read_text()
    assert {rule for rule in RULES if f'"{rule}"' not in source} == set()
    assert replace(started(), done=3).done == 3
