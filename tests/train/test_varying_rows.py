"""A run whose layout varies its rows: workers, caches and a resume change no bit, and validation reads plain rows."""

from __future__ import annotations

import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minimind_v.core.demo
from minimind_v.core.config.schema import DataConfig, RunConfig, TextConfig
from minimind_v.core.data.layouts import CHAT_LAYOUTS, ChatML
from minimind_v.core.demo.dataset import write_sft
from minimind_v.core.train.loop import Run
from minimind_v.core.train.run import assemble
from tests.conftest import Events

ASSETS = Path(minimind_v.core.demo.__file__).parent / "assets"


class Greeting(ChatML):
    """A layout that adds a greeting to every second training row."""

    varies = True

    def __init__(self, prompt=ChatML.system_prompt):
        self.system_prompt = prompt

    def of_row(self, draw):
        return Greeting("Good day") if draw is not None and draw.random() < 0.5 else self


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_sft(tmp_path_factory.mktemp("data"), random.Random(3), 40)[0]


@pytest.fixture
def config(rows, tmp_path, monkeypatch) -> RunConfig:
    monkeypatch.setitem(CHAT_LAYOUTS, "greeting", Greeting())
    tiny = TextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=600)
    data = DataConfig(rows.data, rows.images, ASSETS, layout="greeting", max_length=256, batch_size=3, workers=0)
    return RunConfig(
        stage="sft", model=tiny, data=data, vision_model=ASSETS / "vision", out=tmp_path / "out", epochs=2, lr=3e-3,
        dtype="float32", device="cpu", save_every=0, val_every=4, val_rows=4, features="off",
    )  # fmt: skip


def numbers(events: Events) -> list[tuple[float, ...]]:
    """The steps of a run, and its validations."""
    steps = [(step.loss, step.grad_norm, step.supervised_tokens) for step in events.steps]
    return steps + [(result.step, result.loss) for result in events.validations]


def trained(config: RunConfig, folder: Path, **changes) -> tuple[Run, Events]:
    events = Events()
    run = assemble(replace(config, out=folder, **changes), events)
    run.run()
    return run, events


@pytest.mark.long
def test_workers_and_caches_change_no_bit(config, tmp_path):
    plain, alone = trained(config, tmp_path / "a")
    spread, other = trained(
        config, tmp_path / "b", data=replace(config.data, workers=2), features="exact", features_dir=tmp_path / "f"
    )
    assert numbers(alone) == numbers(other)
    assert alone.validations
    left, right = plain.train_step.model.state_dict(), spread.train_step.model.state_dict()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.long
def test_training_rows_vary_by_the_seed_and_held_out_rows_do_not(config, tmp_path):
    runs = [trained(config, tmp_path / "a", seed=1), trained(config, tmp_path / "b", seed=1)]
    assert numbers(runs[0][1]) == numbers(runs[1][1])
    plan, held_out = runs[0][0].plan, runs[0][0].validator.plan
    texts = [plan.dataset.text(index).tokens.input_ids for index in range(40)]
    plain = [held_out.dataset.text(index).tokens.input_ids for index in range(40)]
    assert 10 < sum(a != b for a, b in zip(texts, plain, strict=True)) < 30


class Stopping(Events):
    """Asks its run to stop after the fifth step, as Ctrl-C does."""

    def step(self, metrics, logged):
        super().step(metrics, logged)
        if metrics.step == 5:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.long
def test_a_resumed_run_reads_the_same_rows(config, tmp_path):
    plain, expected = trained(config, tmp_path / "a")
    first, rest, config = Stopping(), Events(), replace(config, out=tmp_path / "b")
    assert assemble(config, first).run().steps == 5
    resumed = assemble(config, rest, resume=True)
    resumed.run()
    steps = [(step.loss, step.grad_norm) for step in first.steps + rest.steps]
    assert steps == [(step.loss, step.grad_norm) for step in expected.steps]
    left, right = plain.train_step.model.state_dict(), resumed.train_step.model.state_dict()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
