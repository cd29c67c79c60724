"""A dozen rows of one's own: the recipe learns them, measures what that costs, and says what it did not measure."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

import minimind_v as mmv
from minimind_v.core.config.generation import V2025
from minimind_v.core.config.load import build_config, resolve
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.recipes import OWN_KEYS, small_data
from minimind_v.core.config.schedule import COSINE_2025, COSINE_2026
from minimind_v.core.errors import UsageError
from minimind_v.core.monitor.messages import LEAST_REACH, too_little
from minimind_v.core.pages.run_report import read_run, report_page
from minimind_v.core.train.recall import earlier_run
from tests.cli.harness import EYE, read_rows, run_mmv, sighted, tiny_data, write_rows
from tests.conftest import train_until_killed

ANSWERS = (
    "Momo sleeps.", "Our boat.", "A wheel.", "The garden.", "Uncle Tom.", "My cake.",
    "A bridge.", "Two horses.", "A hat.", "The market.", "Bread.", "Dad at work.",
)  # fmt: skip


@pytest.fixture
def mine(tmp_path):
    """Twelve pictures of noise as files, all asked the same question."""
    return noise(tmp_path, ANSWERS)


def noise(folder, answers):
    """Pictures of noise with an answer each, as options of a command."""
    from PIL import Image

    dice, rows = random.Random(4), []
    (folder / "pictures").mkdir()
    for number, answer in enumerate(answers):
        picture = Image.frombytes("RGB", (6, 6), dice.randbytes(108)).resize((90, 70), Image.Resampling.BICUBIC)
        picture.save(folder / "pictures" / f"{number}.jpg")
        talk = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": answer}]
        rows.append({"conversations": talk, "image": f"{number}.jpg"})
    return {"data": write_rows(folder / "mine.jsonl", rows), "images": folder / "pictures"}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """Weights with the folder of the run that made them."""
    out = tmp_path_factory.mktemp("earlier")
    ended = run_mmv(*tiny_data().train(out, "sft", init=sighted(), lr=1e-3))
    assert ended.code == 0, ended.err
    return out / "sft_vlm_128.pth"


def small_line(out, init, mine, **changes):
    """The command line of the recipe."""
    given = {"init": init, "epochs": None, "batch_size": None, "log_every": None, "recipe": "small-data"}
    return tiny_data().train(out, "sft", **mine, **given | changes)


def small(out, init, mine, *options, **changes):
    """Run the recipe."""
    return run_mmv(*small_line(out, init, mine, **changes), *options)


def events(out, key):
    return [event[key] for event in read_rows(out / "sft_vlm_128" / "events.jsonl") if key in event]


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_twelve_pictures_are_learnt_and_what_was_forgotten_is_said(tmp_path, mine, earlier):
    ended = small(tmp_path / "out", earlier, mine)
    assert ended.code == 0, ended.err
    assert f"learnt: every answer of the 12 rows of {mine['data']} is correct, token for token" in ended.err
    assert f"kept: on 32 rows of {tiny_data().data('sft')}, not trained on now, " in ended.err
    last = read_rows(tmp_path / "out" / "sft_vlm_128" / "metrics.jsonl")[-1]
    assert last["step"] == last["steps"] < 60 * 12, "it ends as soon as all is right"
    assert last["step"] % 12 == 0
    for line in ("raise --lr", "move a weight", "not measured"):
        assert line not in ended.err
    model = ("--model", tmp_path / "out" / "sft_vlm_128.pth", "--vision-model", EYE, "--tokenizer", EYE.parent)
    scores = run_mmv("eval", *model, "--data", mine["data"], "--images", mine["images"], "--json").json
    assert (scores["short_answers"], scores["accuracy"]) == (12, 1.0)
    recalled = {when: score for event in events(tmp_path / "out", "recalled") for when, score in event.items()}
    assert set(recalled) == {"before", "own", "after"}
    assert (recalled["own"]["token_accuracy"], recalled["own"]["rows"], recalled["before"]["rows"]) == (1.0, 12, 32)
    assert recalled["before"]["loss"] < recalled["after"]["loss"]
    page = report_page(read_run(tmp_path / "out" / "sft_vlm_128"))
    assert "Learnt and kept" in page
    assert "was not measured" not in page
    assert "steps, finished" in page
    again = small(tmp_path / "out", earlier, mine, "--resume")
    assert (again.code, "this run is already finished" in again.err) == (0, True), again.err


@pytest.mark.long
def test_a_stopped_run_resumes_to_the_same_end(tmp_path, earlier):
    few, given = noise(tmp_path, ANSWERS[:4]), {"lr": 1e-3, "save_every": 10}
    assert small(tmp_path / "whole", earlier, few, **given).code == 0
    train_until_killed(10, small_line(tmp_path / "parts", earlier, few, **given))
    ended = small(tmp_path / "parts", earlier, few, "--resume", **given)
    assert ended.code == 0, ended.err
    assert "resuming after step 10" in ended.err
    assert "kept: on 32 rows" in ended.err, "what was measured before the stop is known"
    whole, resumed = ((tmp_path / name / "sft_vlm_128.pth").read_bytes() for name in ("whole", "parts"))
    assert whole == resumed


@pytest.mark.parametrize("trouble", ["no folder", "no rows", "same rows"])
def test_what_cannot_be_measured_is_said(tmp_path, mine, earlier, trouble):
    init = tmp_path / "sft_vlm_128.pth"
    for ending in (".pth", ".json"):
        init.with_suffix(ending).write_bytes(earlier.with_suffix(ending).read_bytes())
    if trouble != "no folder":
        (tmp_path / "sft_vlm_128").mkdir()
        for name in ("manifest.json", "config.yaml"):
            text = (earlier.with_suffix("") / name).read_text()
            here_now = mine["data"] if trouble == "same rows" else tmp_path / "gone.jsonl"
            text = text.replace(str(tiny_data().data("sft")), str(here_now))
            (tmp_path / "sft_vlm_128" / name).write_text(text)
    why = {
        "no folder": f"the training rows of {init} are not recorded",
        "no rows": f"{tmp_path / 'gone.jsonl'}, the training data of {init}, does not exist",
        "same rows": "was trained on these same rows",
    }[trouble]
    ended = small(tmp_path / "out", init, mine, epochs=2)
    assert ended.code == 0, ended.err
    assert f"has forgotten of what {init} knew (" in ended.err
    assert why in ended.err
    assert "some answers were not learnt: " in ended.err
    assert "was not measured" in report_page(read_run(tmp_path / "out" / "sft_vlm_128"))


def test_companions_of_published_weights_are_searched_in_the_download_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert earlier_run(Path("sft_vlm_512.pth"), PRESETS["small"]) is None
    Path("dataset").mkdir()
    for stage in ("pretrain", "sft"):
        Path(f"dataset/{stage}_i2t.parquet").touch()
        assert earlier_run(Path(f"{stage}_vlm_512.pth"), PRESETS["small"]).file == Path(f"dataset/{stage}_i2t.parquet")


def test_nothing_is_trained_or_written_where_every_answer_is_right_already(tmp_path, earlier):
    """Rows without images, whose answers are what the model says."""
    asked = [{"role": "user", "content": "What is this?"}]
    loaded = mmv.load(earlier, vision_model=EYE, tokenizer=EYE.parent)
    asked.append({"role": "assistant", "content": str(loaded.ask(asked[0]["content"], temperature=0))})
    rows = {"data": write_rows(tmp_path / "mine.jsonl", [{"conversations": asked}] * 2), "images": None}
    ended = small(tmp_path / "out", earlier, rows)
    assert ended.code == 0, ended.err
    assert f"nothing to learn: {earlier} answers every row of {rows['data']} correctly (2 rows)" in ended.err
    assert "done after 0 steps; no weights written" in ended.err
    assert f"chat with it: mmv chat --model {earlier}" in ended.err
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_epochs_are_those_that_the_steps_are(tmp_path, earlier, mine):
    ended = small(tmp_path / "out", earlier, mine, max_steps=6)
    assert ", 0.5 epochs, 6 steps of 1 row on cpu" in ended.err


# --- what it is made of -----------------------------------------------------------------------------------------------


def test_the_command_line_decides_over_a_file_and_single_values_over_the_recipe(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lr: 1e-6\nepochs: 2\nfreeze: attention\naccumulate: 4\ndata: {batch_size: auto, max_length: 99}\n")
    resolved = resolve("sft", file, {"recipe": "small-data", "epochs": 5}, ["weight_decay=0.5"])
    config, recipe = resolved.config, small_data()
    assert (config.lr, config.freeze, config.accumulate) == (recipe.lr, recipe.freeze, 1)
    assert (config.data.batch_size, resolved.auto) == (recipe.data.batch_size, False)
    assert (config.epochs, config.data.max_length, config.weight_decay) == (5, 99, 0.5)
    assert (resolved.sources["lr"], resolved.sources["epochs"]) == ("recipe small-data", "--epochs")
    assert resolved.sources["weight_decay"] == "--set"
    file.write_text("recipe: small-data\nlr: 1e-4\n")
    config = build_config("sft", file)
    assert (config.lr, config.epochs, config.until_right) == (1e-4, recipe.epochs, True)
    assert build_config("sft", sets=["recipe=small-data"]) == build_config("sft", options={"recipe": "small-data"})


@pytest.mark.parametrize("file", sorted(Path("configs").glob("sft_*.yaml")), ids=lambda file: file.stem)
def test_the_recipe_works_over_every_file_of_the_stage(file):
    resolved = resolve("sft", file, {"recipe": "small-data"})
    given = {key: resolved.sources[key] for key in OWN_KEYS["small-data"]}
    assert set(given.values()) == {"recipe small-data"}
    assert resolved.config.model == build_config("sft", file).model


def test_the_recipe_is_printed_and_read_again(tmp_path):
    printed = run_mmv("train", "sft", "--recipe", "small-data", "--print-config").out
    (tmp_path / "c.yaml").write_text(printed)
    assert build_config("sft", tmp_path / "c.yaml") == build_config("sft", options={"recipe": "small-data"})
    assert yaml.safe_load(printed)["out"] == "out/small-data"


def test_a_recipe_for_another_stage_or_of_no_such_name_is_refused():
    assert "`mmv train sft --recipe small-data`" in run_mmv("train", "pretrain", "--recipe", "small-data").error
    assert "did you mean 'small-data'" in run_mmv("train", "sft", "--recipe", "smal-data").error
    with pytest.raises(UsageError, match="recipe 3 must be one of"):
        build_config("sft", sets=["recipe=3"])


def test_it_starts_from_the_best_weights_there_are_and_never_from_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "small-data").mkdir(parents=True)

    def init(**options):
        return build_config("sft", options={"recipe": "small-data"} | options).init

    assert init() == Path("out/sft_vlm_512.pth"), "nothing is there"
    Path("out/small-data/sft_vlm_512.pth").touch()
    Path("out/pretrain_vlm_512.pth").touch()
    assert init() == Path("out/pretrain_vlm_512.pth")
    Path("out/sft_vlm_512.pth").touch()
    assert init() == Path("out/sft_vlm_512.pth")
    for own in ("out", tmp_path / "out"):
        assert init(out=own).resolve() == tmp_path / "out" / "pretrain_vlm_512.pth"


# --- what is said before the start ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "steps"), [(1e-6, 180), (1e-6, 3), (4e-4, 4), (1e-9, 10**5), (1e-5, 40)])
def test_a_learning_rate_too_small_to_change_weights_is_reported_with_one_that_can(lr, steps):
    config = build_config("sft", options={"lr": lr, "epochs": 2})
    line = too_little(config, 12, steps)
    assert f"--lr {lr:g} cannot move a weight" in line
    assert "or --recipe small-data" in line
    advice = line.partition("try ")[2].replace(",", "").split()
    advised = {word: float(advice[at + 1]) for at, word in enumerate(advice) if word in ("--lr", "--epochs")}
    assert advised
    better = build_config("sft", options={"lr": advised.get("--lr", lr)})
    more = round(steps * advised.get("--epochs", 2) / 2)
    assert too_little(better, 12, more) is None
    assert too_little(config, 10**6, steps) == line.replace(", or --recipe small-data (for few rows)", "")


def test_nothing_is_said_of_the_published_runs_nor_of_the_recipe():
    for stage, steps in (("pretrain", 4 * 595_000 // 16), ("sft", 2 * 300_000 // 4)):
        assert too_little(build_config(stage), 10**6, steps) is None
    assert too_little(small_data(), 3, 180) is None


def test_max_steps_that_are_too_few_are_named():
    config = build_config("sft", options={"lr": 5e-4, "max_steps": 2})
    assert "try --max-steps 34" in too_little(config, 10**6, 2)


@pytest.mark.long
def test_it_is_said_before_the_first_step_and_by_the_plan(tmp_path, mine):
    ended = run_mmv(*tiny_data().train(tmp_path, "sft", **mine, init=sighted(), lr=1e-6, epochs=5, batch_size=16))
    lines = ended.err.splitlines()
    at = next(n for n, line in enumerate(lines) if "5 steps of 12 rows" in line)
    assert "learning rate 1e-06, from 1.1e-06 down to 1e-07" in lines[at]
    assert "5 steps at --lr 1e-06 cannot move a weight" in lines[at + 1]
    assert lines[at + 2].startswith("step 1/5")
    assert events(tmp_path, "warning")[0] in lines[at + 1]
    command = tiny_data().train(tmp_path / "plan", "sft", **mine, init=sighted(), lr=1e-6, epochs=5)
    planned = run_mmv("plan", *command[1:], "--json").json
    assert planned["learning_rate"] == pytest.approx([1.1e-6, 1e-7])
    assert "cannot move a weight" in planned["warning"]
    assert run_mmv("plan", *command[1:]).err.count("cannot move a weight") == 1


def test_few_held_out_rows_are_reported_as_weak_evidence(tmp_path, mine):
    ended = run_mmv(*tiny_data().train(tmp_path, "sft", **mine, init=sighted(), lr=1e-3, epochs=2, val_every=3))
    assert ended.code == 0, ended.err
    assert "12 rows of" in ended.err
    assert "(1 of them held out)" in ended.err
    assert "6 steps of 4 rows" in ended.err
    assert "only 1 row of 12 held out" in ended.err


@pytest.mark.parametrize(("cosine", "highest"), [(COSINE_2025, 3.3e-4), (COSINE_2026, 3e-4)])
def test_the_peak_is_the_highest_rate(cosine, highest):
    rates = [cosine.rate(step, 50, 3e-4) for step in range(1, 51)]
    assert cosine.peak(3e-4) == pytest.approx(highest)
    assert max(rates) == pytest.approx(highest, rel=1e-3)
    assert sum(rates) == pytest.approx(cosine.reach(3e-4, 50), rel=0.02), "what LEAST_REACH is compared with"
    assert 0 < LEAST_REACH < 0.01


def test_the_card_of_an_export_gives_the_true_peak(tmp_path):
    from types import SimpleNamespace

    from minimind_v.core.formats.hf import card

    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.yaml").write_text(yaml.safe_dump({"lr": 1e-6, "freeze": "all"}))
    order = SimpleNamespace(model=tmp_path / "w.pth")
    checkpoint = SimpleNamespace(stage="sft", generation=V2025, config=PRESETS["demo"])
    text = card._training(SimpleNamespace(checkpoint=checkpoint), order)
    assert "| peak learning rate | 1.1e-06 |" in text
