"""Killed at any moment, a run leaves a whole weights file or none: never a part of one."""

import itertools
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.formats.checkpoint import read_checkpoint, write_checkpoint
from tests.cli.harness import ROOT, Running, tiny_data

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
def test_saving_without_pause(tmp_path, ending):
    """Each save is of one number, so a file of two saves would show."""
    path = tmp_path / f"weights{ending}"
    steps = set()
    for moment in range(3):
        before = saved_at(path)
        code = f"from {__name__} import save_for_ever; save_for_ever({str(path)!r}, {moment * 100_000})"
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as child:
            while saved_at(path) == before:
                assert child.poll() is None
                time.sleep(0.001)
            time.sleep(random.Random(f"{ending}{moment}").uniform(0, 0.06))
            child.kill()
        values = torch.cat([tensor.flatten() for tensor in read_checkpoint(path).tensors.values()]).unique()
        assert len(values) == 1
        steps.add(int(values))
    assert len(steps) == 3


def save_for_ever(path, start):
    for number in itertools.count(start):
        write_checkpoint(Path(path), filled(number), CONFIG, "sft")


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
