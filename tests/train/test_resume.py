"""A run that was stopped, however, and resumed ends as one that never was: the same numbers to the last bit."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.monitor import fingerprint as origin
from tests.cli.harness import BASE, MMV, Running, read_rows, run_mmv, sighted, tiny_data, write_rows
from tests.conftest import train_until_killed
from tests.train.staying import STEP, UNTIL, stay

NAME = "pretrain_vlm_128"
# Two epochs of 17 rows: 9 micro-batches of 2 rows each, 5 steps, the last of an epoch smaller.
ROWS = 17
STEPS = {"epochs": 2, "batch_size": 2, "accumulate": 2, "save_every": 2}
EXACT = ("step", "loss", "token_accuracy", "lr", "grad_norm", "epoch", "samples", "tokens", "supervised_tokens")


@cache
def data(stage="pretrain"):
    """The first rows of the tiny data, beside their pictures."""
    return write_rows(tiny_data().folder / f"few_{stage}.jsonl", read_rows(tiny_data().data(stage))[:ROWS])


def command(out, stage="pretrain", **changes):
    """The command line of a run."""
    return tiny_data().train(out, stage, **STEPS | {"data": data(stage)} | changes)


def curve(out, name=NAME):
    return [{key: record[key] for key in EXACT} for record in read_rows(out / name / "metrics.jsonl")]


def states(out, name=NAME):
    return sorted((out / name / "states").glob("*"))


def assert_same_run(out, reference, name=NAME):
    assert curve(out, name) == curve(reference, name)
    ours, theirs = (read_checkpoint(folder / f"{name}.pth").tensors for folder in (out, reference))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    last, expected = (load_file(states(folder, name)[-1]) for folder in (out, reference))
    assert last.keys() == expected.keys()
    assert all(torch.equal(last[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, never interrupted, in this process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ended = run_mmv(*command(out))
    assert ended.code == 0, ended.err
    return out


@pytest.fixture
def reference(whole, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(whole, tmp_path / "reference")


@pytest.fixture(scope="module")
def whole_alone(tmp_path_factory):
    """The same run in a process of its own."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert alone(out).wait().code == 0
    return out


# --- stopped in good order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 5, 9])
def test_from_any_step_on(tmp_path, reference, step):
    out = tmp_path / "out"
    train_until_killed(step, command(out))
    ended = run_mmv(*command(out), "--resume")
    assert ended.code == 0, ended.err
    saved = step // 2 * 2
    assert (f"resuming after step {saved} of 10" if saved else "nothing to resume") in ended.err
    assert_same_run(out, reference)


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "changes", "options"),
    [
        ("pretrain", {"workers": 2}, ()),
        ("sft", {"lr": 1e-4, "init": sighted()}, ()),
        ("pretrain", {"init": "none"}, ("--set", "model.use_moe=true")),
        ("pretrain", {"dtype": "bfloat16"}, ()),
    ],
    ids=["workers", "sft", "experts", "bf16"],
)
def test_stopped_twice(tmp_path, stage, changes, options):
    name = f"{stage}_vlm_128" + ("_moe" if options else "")
    assert run_mmv(*command(tmp_path / "reference", stage, **changes | {"workers": 0}), *options).code == 0
    for step in (3, 7):
        train_until_killed(step, [*command(tmp_path / "out", stage, **changes), *options], resume=True)
    assert run_mmv(*command(tmp_path / "out", stage, **changes), *options, "--resume").code == 0
    assert_same_run(tmp_path / "out", tmp_path / "reference", name)


def test_a_complete_run_is_left_as_it_is(reference):
    before = {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()}
    ended = run_mmv(*command(reference), "--resume")
    assert ended.code == 0
    assert "this run is already finished" in ended.err
    assert {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()} == before


def test_broken_rows_are_counted_once(tmp_path):
    lines = data().read_text().splitlines()
    rows = write_rows(tmp_path / "rows.jsonl", [*lines[:5], "{", *lines[5:9], "nothing", *lines[9:]])
    line = command(tmp_path / "out", data=rows)
    train_until_killed(6, [*line, "--set", "data.bad_rows=0.5"])
    ended = run_mmv(*line, "--set", "data.bad_rows=0.5", "--resume")
    assert "2 broken rows skipped" in ended.err


# --- killed -----------------------------------------------------------------------------------------------------------


def alone(out, *options):
    """A run in a process of its own, of one thread: what is compared bit for bit has the same number of them."""
    return Running(out.parent / f"{out.name}.{time.monotonic_ns()}", *command(out, workers=1), *options)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_killed_for_real_again_and_again(tmp_path, whole_alone, number):
    out, rng, codes = tmp_path / "out", random.Random(number), []
    for _ in range(3):
        run = alone(out, "--resume")
        while run.alive and "epochs, " not in run.err:  # has announced itself
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        codes.append(run.send(number).wait().code if run.alive else 0)
    # Just before a run heeds signals, and once it has ended, a signal ends the process at once.
    assert set(codes) <= {0, -number, 128 + number}
    last = alone(out, "--resume").wait()
    assert last.code == 0, last.err
    assert_same_run(out, whole_alone)


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "resumed"),
    [
        ({"workers": 2, "features": "off"}, {"workers": 0}),
        ({"workers": 1, "features": "int8"}, {"workers": 2}),
        ({"gpus": 2, "device": "cpu", "features": "int8", "batch_size": 1}, {}),
    ],
    ids=["fewer workers", "more workers", "two processes"],
)
def test_killed_for_real_and_resumed_with_another_number_of_workers(tmp_path, monkeypatch, changes, resumed):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert Running(tmp_path / "0", *command(whole, **changes)).wait().code == 0
    monkeypatch.setenv(STEP, "4")
    monkeypatch.setenv(UNTIL, str(tmp_path / "never"))
    run = Running(tmp_path / "1", *command(out, **changes), prepare=stay)
    run.until(lambda: list(out.glob(f"{NAME}/states/step-*"))).send(signal.SIGKILL, group=True).wait()
    last = Running(tmp_path / "2", *command(out, **changes | resumed), "--resume").wait()
    assert last.code == 0, last.err
    assert "resuming after step " in last.err
    assert_same_run(out, whole)


@pytest.mark.long
def test_a_stop_says_how_to_resume(tmp_path):
    run = Running(tmp_path / "run", *tiny_data().train(tmp_path / "out", epochs=10_000, workers=1), "--overwrite")
    run.until(lambda: "step 3/" in run.err)
    ended = run.send(signal.SIGTERM).wait()
    assert ended.code == 143
    command = ended.err.splitlines()[-1]
    assert command.startswith(f"resume with: {MMV} train pretrain --preset demo ")
    assert f"chat with it: {MMV} chat --model " in ended.err
    assert command.endswith(" --resume")
    assert "--overwrite" not in command


# --- states -----------------------------------------------------------------------------------------------------------


def test_a_state_holds_what_trains_and_nothing_else(reference):
    tensors = load_file(states(reference)[-1])
    names = {name.partition(".")[2] for name in tensors if name.startswith("weight.")}
    assert {".".join(name.split(".")[:3]) for name in names} == {"vision_proj.vision_proj.0", "model.layers.3"}
    assert {name.partition(".")[0] for name in tensors} == {"weight", "exp_avg", "exp_avg_sq", "step", "rng"}
    trained = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("weight."))
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if not name.startswith("rng."))
    assert states(reference)[-1].stat().st_size < 3 * 4 * trained + 50_000


def test_the_last_two_states_are_kept(reference):
    assert [path.name[:15] for path in states(reference)] == ["step-0000000008", "step-0000000010"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "page"])
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, reference, damage):
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    newest = states(out)[-1]
    data = newest.read_bytes()
    middle = len(data) // 2
    newest.write_bytes({
        "cut": data[:middle],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"",
        "page": b"<!DOCTYPE html>",
    }[damage])  # fmt: skip
    ended = run_mmv(*command(out), "--resume")
    assert ended.code == 0, ended.err
    assert f"{newest} is damaged" in ended.err
    assert "resuming after step 8 of 10" in ended.err
    assert_same_run(out, reference)


def test_where_every_state_is_damaged_the_run_is_refused(tmp_path, reference):
    for path in states(reference):
        path.write_bytes(b"")
    ended = run_mmv(*command(reference), "--resume")
    assert ended.code == 1
    assert "it contains no undamaged state — start over with --overwrite" in ended.error


def test_weights_without_a_state_cannot_be_resumed(reference):
    shutil.rmtree(reference / NAME / "states")
    ended = run_mmv(*command(reference), "--resume")
    assert ended.code == 2
    assert "no state to resume from" in ended.error


def test_starting_over_leaves_no_state_of_before(reference):
    assert run_mmv(*command(reference)).code == 2
    assert run_mmv(*command(reference, max_steps=1), "--overwrite").code == 0
    assert [path.name[:15] for path in states(reference)] == ["step-0000000001"]
    assert run_mmv(*command(reference), "--overwrite", "--resume").code == 2


# --- another run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def halfway(tmp_path):
    train_until_killed(5, command(tmp_path / "out"))
    return tmp_path / "out"


def test_differences_are_reported_line_by_line_and_refused(tmp_path, halfway):
    lines = data().read_text().splitlines()
    other = write_rows(tmp_path / "other.jsonl", lines[:-1])
    ended = run_mmv(*command(halfway, lr=1e-5, data=other), "--resume", "--quiet")
    assert ended.code == 2
    first, *differences = sorted(ended.err.splitlines(), key=lambda line: line.startswith(" "))
    assert re.search("accept it with --allow (lr --allow data.file|data.file --allow lr), start over", first)
    assert len(differences) == 2
    assert "  lr: 0.0004 in the interrupted run, 1e-05 now" in differences
    assert any(line.startswith("  data.file: ") and " bytes " in line for line in differences)


def test_changed_rows_beside_many_pictures_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "MANY", 3)
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(bytes(8))
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a cat\n")
    before = origin.fingerprint(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a dog\n")
    assert origin.fingerprint(tmp_path) != before


def test_what_is_allowed_by_name_may_differ(halfway):
    line = command(halfway, lr=1e-5)
    ended = run_mmv(*line, "--resume", "--allow", "lr")
    assert ended.code == 0, ended.err
    assert curve(halfway)[-1]["lr"] < 1.1e-5
    assert "did you mean 'lr'" in run_mmv(*line, "--resume", "--allow", "lrr").error


def test_the_same_files_elsewhere_are_the_same_run(tmp_path, halfway, reference):
    copy = shutil.copy(data(), tmp_path / "copy.jsonl")
    base = shutil.copy(BASE, tmp_path / "base.safetensors")
    line = command(halfway, data=copy, init=base, workers=2, log_every=1)
    assert run_mmv(*line, "--resume").code == 0
    assert_same_run(halfway, reference)
