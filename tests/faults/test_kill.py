"""Killed at any moment, a run leaves a whole weights file or none: never a part of one."""

import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.formats.checkpoint import read_checkpoint, write_checkpoint
from tests.cli.harness import Running, tiny_data

PATH, START = "TEST_PATH", "TEST_START"  # the variables that name a file and the number of its first save
CONFIG = TextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=8)


@pytest.mark.long
@pytest.mark.parametrize("moment", range(4))
def test_a_run_that_saves_after_every_step(tmp_path, moment):
    weights = tmp_path / "out" / "pretrain_vlm_128.pth"
    run = Running(tmp_path, *tiny_data().train(weights.parent, epochs=10_000, workers=1, save_every=1))
    saved_once = moment % 2
    run.until(weights.exists if saved_once else lambda: "step 1/" in run.err)
    time.sleep(random.Random(moment).uniform(0, 0.25))
    run.send(signal.SIGKILL).wait()
    if saved_once or weights.exists():
        assert len(read_checkpoint(weights).tensors) == 41


@pytest.mark.long
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_saving_without_pause(tmp_path, monkeypatch, ending):
    """Each save is of one number, so a file of two saves would show."""
    path = tmp_path / f"weights{ending}"
    monkeypatch.setenv(PATH, str(path))
    steps = set()
    for moment in range(3):
        before = saved_at(path)
        monkeypatch.setenv(START, str(moment * 100_000))
        run = Running(tmp_path / str(moment), prepare=save_for_ever)
        run.until(lambda before=before: saved_at(path) != before)
        time.sleep(random.Random(f"{ending}{moment}").uniform(0, 0.06))
        run.send(signal.SIGKILL).wait()
        values = torch.cat([tensor.flatten() for tensor in read_checkpoint(path).tensors.values()]).unique()
        assert len(values) == 1
        steps.add(int(values))
    assert len(steps) == 3


def save_for_ever():
    for number in itertools.count(int(os.environ[START])):
        write_checkpoint(Path(os.environ[PATH]), filled(number), CONFIG, "sft")


def saved_at(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def filled(number):
    wide = torch.full((300, 300), float(number))
    return {
        "model.embed_tokens.weight": torch.full((8, 16), float(number)),
        "model.layers.0.self_attn.k_proj.weight": torch.full((16, 16), float(number)),
        "model.layers.0.mlp.gate_proj.weight": torch.full((64, 16), float(number)),
        **{f"model.layers.0.extra{n}.weight": wide for n in range(8)},
    }
