"""Where experts are balanced over micro-batches, a resume keeps the division of a step; elsewhere it is free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimind_v.core.config.schema import DataConfig, RunConfig, TextConfig
from minimind_v.core.errors import UsageError
from minimind_v.core.monitor.metrics import Listener
from minimind_v.core.train.run_folder import Claim, RunFolder
from tests.formats.made3v import DENSE, MOE

MOE_2025 = TextConfig(hidden_size=32, num_attention_heads=4, use_moe=True)


def recipe(out: Path, model: TextConfig, batch_size: int = 4, accumulate: int = 2) -> RunConfig:
    none = out / "none"  # no input is read
    data = DataConfig(none, None, none, batch_size=batch_size)
    return RunConfig(stage="sft", model=model, data=data, vision_model=none, out=out, accumulate=accumulate)


def claim(config: RunConfig, processes: int = 1, allowed: tuple[str, ...] = (), auto: bool = False) -> Claim:
    return RunFolder(config).claim(processes, torch.device("cpu"), False, True, allowed, Listener(), auto)


@pytest.fixture(params=[MOE, DENSE, MOE_2025], ids=["3v-moe", "3v", "moe"])
def model(request, tmp_path) -> TextConfig:
    """The model of a run of 4 × 2 rows per step in `tmp_path`, which was stopped after its fifth step."""
    config = recipe(tmp_path, request.param)
    progress = {"step": 5, "split": [config.data.batch_size, config.accumulate]}
    folder = RunFolder(config)
    folder.states.write(5, {}, progress, claim(config).origin)
    return request.param


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes", "differing"),
    [(4, 2, 1, []), (8, 1, 1, ["data.batch_size"]), (4, 2, 2, ["processes"]), (4, 1, 2, ["processes"]),
     (2, 2, 2, ["data.batch_size", "processes"])],
)  # fmt: skip
def test_a_resume_may_divide_a_step_anew_unless_micro_batches_are_balanced(
    tmp_path, model, batch_size, accumulate, processes, differing
):
    config = recipe(tmp_path, model, batch_size, accumulate)
    if model.balances_batches and differing:
        with pytest.raises(UsageError, match=" ".join(f"--allow {key}" for key in differing)):
            claim(config, processes)
        assert claim(config, processes, tuple(differing)).origin["rows_per_update"] == 8
    else:
        assert claim(config, processes).origin["rows_per_update"] == 8


def test_a_resume_that_takes_the_batch_size_of_the_state_keeps_the_division(tmp_path, model):
    assert model.balances_batches == (model is MOE)
    assert claim(recipe(tmp_path, model, 8, 1), auto=True).origin["rows_per_update"] == 8


def test_a_batch_size_that_was_found_is_the_one_that_is_compared(tmp_path):
    """A run that began as 8 × 1 with --batch-size auto, which became 2 × 4."""
    config = recipe(tmp_path, MOE, 8, 1)
    folder = RunFolder(config)
    folder.states.write(5, {}, {"step": 5, "split": [2, 4]}, claim(config).origin)
    with pytest.raises(UsageError, match=r"--allow data\.batch_size"):
        claim(config)
    assert claim(replace(config, data=replace(config.data, batch_size=2), accumulate=4)).origin["rows_per_update"] == 8
