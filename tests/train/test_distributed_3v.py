"""Rows of minimind-3v in a run of several processes: the drawn forms and a resume are those of one process."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.harness import Ended, Running, installed, read_rows, tiny_data
from tests.formats.made3v import SIZES, tiny_3v
from tests.train.staying import STEP, UNTIL, stay

NAME = "sft_vlm_48"
SETS = [word for name, value in SIZES.items() for word in ("--set", f"model.{name}={value}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny_3v(folder, name="init.pth")
    return folder


def command(folder: Path, out: Path, processes: int) -> list[object]:
    """A run of 10 steps of 8 rows."""
    changes = {"preset": "3v", "vision_model": folder / "siglip", "tokenizer": folder / "words", "epochs": 2,
               "init": folder / "init.pth", "batch_size": 8 // processes, "gpus": processes, "lr": 1e-3,
               "save_every": 2, "max_length": 200}  # fmt: skip
    return [*tiny_data().train(out, "sft", **changes), *SETS]


def trained(folder: Path, out: Path, processes: int) -> Ended:
    ended = installed(*command(folder, out, processes), OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.err
    return ended


def numbers(out: Path, *keys: str) -> list[list[float]]:
    return [[record[key] for key in keys] for record in read_rows(out / NAME / "metrics.jsonl")]


def last_state(out: Path) -> dict[str, torch.Tensor]:
    return load_file(max((out / NAME / "states").glob("*.safetensors")))


@pytest.mark.long
def test_two_processes_draw_the_forms_of_one_and_resume_bit_for_bit(folder, tmp_path, monkeypatch):
    alone, pair, stopped = (tmp_path / name for name in ("alone", "pair", "stopped"))
    trained(folder, alone, 1)
    trained(folder, pair, 2)
    counts = ("step", "samples", "tokens", "supervised_tokens")
    assert numbers(pair, *counts) == numbers(alone, *counts)
    for ours, theirs in zip(numbers(pair, "loss", "grad_norm"), numbers(alone, "loss", "grad_norm"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    monkeypatch.setenv(STEP, "3")
    monkeypatch.setenv(UNTIL, str(tmp_path / "never"))
    run = Running(tmp_path / "run", *command(folder, stopped, 2), prepare=stay)
    run.until(lambda: "\nstep 3/" in run.err)
    assert run.send(signal.SIGTERM).wait().code == 143
    assert 3 <= len(numbers(stopped, "step")) < 10
    shutil.copytree(stopped, tmp_path / "other")
    ended = installed(*command(folder, stopped, 2), "--resume", OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.err
    exact = (*counts, "loss", "grad_norm", "token_accuracy")
    assert numbers(stopped, *exact) == numbers(pair, *exact)
    ours, theirs = last_state(stopped), last_state(pair)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ended = installed(*command(folder, tmp_path / "other", 1), "--resume", OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.err
    assert numbers(tmp_path / "other", *counts) == numbers(alone, *counts)
