"""Rows held out by picture: chosen once, never learnt from, and looked at without leaving a trace."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from minimind_v.core.errors import UsageError
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.formats.load import load
from minimind_v.core.rows.heldout import hold_out
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train import saver
from tests.cli.harness import ASSETS, EYE, read_rows, run_mmv, tiny_data, write_rows
from tests.conftest import train_until_killed

NAME = "pretrain_vlm_128"
LINE = {"epochs": 3, "val_every": 5, "lr": 4e-3}  # 36 rows to learn from, 9 steps an epoch


def events(out, kind):
    return [event[kind] for event in read_rows(out / NAME / "events.jsonl") if kind in event]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validated") / "out"
    ended = run_mmv(*tiny_data().train(folder, **LINE))
    assert ended.code == 0, ended.err
    assert ended.err.count("validation loss") == 6
    return folder


@pytest.fixture(scope="module")
def paired_rows(tmp_path_factory):
    """Sixty rows over thirty pictures, two rows each."""
    rows = read_rows(tiny_data().data("pretrain"))[:30]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows + rows[::-1])


def test_held_out_rows_share_no_picture_with_others(paired_rows, tmp_path):
    rows = open_rows(paired_rows, tiny_data().images("pretrain"))
    mask = hold_out(rows, 20, 1, tmp_path / "known.json", "data", lambda line: None)
    assert mask.sum() == 6, "a tenth"
    shown = [{name for index in np.flatnonzero(side) for name in rows.row(index).images} for side in (mask, ~mask)]
    assert len(shown[0]) == 3
    assert not shown[0] & shown[1]


def test_the_choice_is_the_seeds_and_is_stored(paired_rows, tmp_path):
    rows, messages = open_rows(paired_rows, tiny_data().images("pretrain")), []
    path = tmp_path / "known.json"
    first = hold_out(rows, 6, 1, path, "data", messages.append)
    assert len(messages) == 1
    assert (hold_out(rows, 6, 1, path, "data", messages.append) == first).all()
    assert len(messages) == 1, "read from the file"
    assert (hold_out(rows, 6, 1, tmp_path / "other.json", "data", messages.append) == first).all()
    assert (hold_out(rows, 6, 2, tmp_path / "other.json", "data", messages.append) != first).any()
    hold_out(rows, 6, 1, path, "other data", messages.append)
    assert len(messages) == 4
    path.write_text("nonsense")
    assert (hold_out(rows, 6, 1, path, "data", messages.append) == first).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda noted: noted | {"rows": [0]},
        lambda noted: noted | {"rows": [10**9]},
        lambda noted: noted | {"rows": [[0]]},
        lambda noted: {name: noted[name] for name in ("of", "rows")},
        lambda noted: [],
    ],
    ids=["another row", "a row that is not there", "no number", "without a digest", "no object"],
)
def test_a_changed_list_of_held_out_rows_is_ignored(paired_rows, tmp_path, change):
    rows, path = open_rows(paired_rows, tiny_data().images("pretrain")), tmp_path / "known.json"
    first = hold_out(rows, 6, 1, path, "data", lambda line: None)
    noted = path.read_text()
    path.write_text(json.dumps(change(json.loads(noted))))
    assert (hold_out(rows, 6, 1, path, "data", lambda line: None) == first).all()
    assert path.read_text() == noted
    path.write_text("[" * 100_000)
    assert (hold_out(rows, 6, 1, path, "data", lambda line: None) == first).all()


def test_broken_rows_are_never_held_out(tmp_path):
    lines = read_rows(tiny_data().data("pretrain"))
    broken = [{**row, "image": "none.jpg"} if n % 2 else row for n, row in enumerate(lines)]
    rows = open_rows(write_rows(tmp_path / "rows.jsonl", broken), tiny_data().images("pretrain"))
    mask = hold_out(rows, 100, 1, tmp_path / "known.json", "", lambda line: None)
    assert mask.sum() == 4
    assert not mask[1::2].any()


def test_too_few_rows_are_refused(tmp_path):
    rows = open_rows(write_rows(tmp_path / "rows.jsonl", read_rows(tiny_data().data("pretrain"))[:9]))
    with pytest.raises(UsageError, match="leave out --val-every"):
        hold_out(rows, 100, 1, tmp_path / "known.json", "", lambda line: None)


def test_held_out_rows_are_not_trained_on(out):
    assert read_rows(out / NAME / "metrics.jsonl")[-1]["samples"] == 3 * 36
    assert len(json.loads((out / NAME / "held_out.json").read_text())["rows"]) == 4


def test_the_loss_is_what_eval_finds_on_the_same_rows(out, tmp_path):
    lines = read_rows(tiny_data().data("pretrain"))
    chosen = json.loads((out / NAME / "held_out.json").read_text())["rows"]
    data = write_rows(tmp_path / "held.jsonl", [lines[index] for index in chosen])
    shown = ("--data", data, "--images", tiny_data().images("pretrain"), "--vision-model", EYE, "--tokenizer", ASSETS)
    scores = run_mmv("eval", "--model", out / f"{NAME}.pth", *shown, "--json", "--device", "cpu").json
    last = events(out, "validation")[-1]
    assert last["step"] == 27
    assert last["rows"] == 4
    assert last["loss"] == pytest.approx(scores["loss"], rel=2e-3)  # the file has half precision
    assert last["swapped_loss"] > last["loss"]


def test_the_best_weights_are_kept(out):
    validations = events(out, "validation")
    losses = [validation["loss"] for validation in validations]
    assert [validation["best"] for validation in validations] == [
        loss < min(losses[:n], default=9) for n, loss in enumerate(losses)
    ]
    kept = read_checkpoint(out / f"{NAME}_best.pth")
    assert kept.stage == "pretrain"
    if validations[-1]["best"]:
        final = read_checkpoint(out / f"{NAME}.pth").tensors
        assert all(torch.equal(kept.tensors[name], final[name]) for name in final)
    assert load(out / f"{NAME}_best.pth", EYE, ASSETS, "cpu").model is not None


@pytest.mark.long
def test_validation_changes_nothing_of_training(out, tmp_path):
    assert run_mmv(*tiny_data().train(tmp_path / "rarely", **LINE | {"val_every": 1000})).code == 0
    often, rarely = (read_rows(folder / NAME / "metrics.jsonl") for folder in (out, tmp_path / "rarely"))
    assert [record["loss"] for record in often] == [record["loss"] for record in rarely]


@pytest.mark.long
def test_a_resumed_run_holds_out_the_same_and_knows_the_best(out, tmp_path):
    line = tiny_data().train(tmp_path / "out", **LINE, save_every=4)
    train_until_killed(12, line)
    ended = run_mmv(*line, "--resume")
    assert ended.code == 0, ended.err
    assert "reading the images" not in ended.err
    assert events(tmp_path / "out", "validation") == events(out, "validation")
    refused = run_mmv(*line, "--overwrite", "--set", "val_every=0", "--max-steps", 1)
    assert refused.code == 0
    assert not (tmp_path / "out" / f"{NAME}_best.pth").exists(), "it was of the run before"


@pytest.mark.long
def test_overfitting_happens_and_is_reported(tmp_path):
    few = write_rows(tmp_path / "few.jsonl", read_rows(tiny_data().data("pretrain"))[:20])
    changes = {"data": few, "images": tiny_data().images("pretrain"), "lr": 6e-3, "epochs": 20, "val_every": 10}
    ended = run_mmv(*tiny_data().train(tmp_path / "out", **changes, freeze="all"))
    assert ended.code == 0, ended.err
    assert "overfitting since step" in ended.err, events(tmp_path / "out", "validation")


@pytest.mark.long
def test_a_model_trained_with_pictures_of_other_rows_ignores_the_images(tmp_path):
    rows = read_rows(tiny_data().data("pretrain"))
    mixed = [{**row, "image": other["image"]} for row, other in zip(rows, rows[7:] + rows[:7], strict=True)]
    data = write_rows(tmp_path / "mixed.jsonl", mixed)
    line = tiny_data().train(
        tmp_path / "out", data=data, images=tiny_data().images("pretrain"), epochs=4, val_every=10, lr=1e-3
    )
    ended = run_mmv(*line)
    assert ended.code == 0, ended.err
    assert "ignores the images" in ended.err, events(tmp_path / "out", "validation")


def test_a_full_disk_costs_the_best_weights_and_not_the_run(tmp_path, monkeypatch):
    from minimind_v.core.errors import RunError

    real = saver.write_checkpoint

    def write(path, *rest):
        if "_best" in path.name:
            raise RunError(f"{path}: not saved (No space left on device)")
        return real(path, *rest)

    monkeypatch.setattr(saver, "write_checkpoint", write)
    ended = run_mmv(*tiny_data().train(tmp_path / "out", **LINE | {"epochs": 1}))
    assert ended.code == 0
    assert "step 5: " in ended.err
    shutil.rmtree(tmp_path / "out")
