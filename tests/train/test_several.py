"""Several GPUs: their steps are recorded too, exchanged outside of the graphs, and read one step late.

Processes that meet over gloo stand in for GPUs, and a tape of torch's operators for a CUDA graph.
"""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import distributed_c10d

from minimind_v.core.config.schema import REDUCE_DTYPES
from minimind_v.core.cuda_graph import EAGER
from minimind_v.core.data.feature_cache import FeatureCache
from minimind_v.core.errors import LostContact
from minimind_v.core.train.distributed import ALONE
from minimind_v.core.train.gradients import Gradients
from minimind_v.core.train.loop import Run
from minimind_v.core.train.step import TrainStep
from tests.conftest import Events, GivenBatches
from tests.model.conftest import tiny_vlm
from tests.train.late import (
    group_experts,
    make_batch,
    make_config,
    make_step,
    no_waits,
    record_steps,
    same,
    tensors_of,
)  # fmt: skip
from tests.train.together import FOLDER, meeting, together

FOLDERS = Path(os.environ.get(FOLDER, "/"))
STEPS = 5 * (EAGER + 4)
BAD = {7, 4 * EAGER}
KINDS = ("small", "moe")
LIMIT = 3  # seconds that an exchange may take


# --- steps ------------------------------------------------------------------------------------------------------------


def batches_of(step: int) -> list:
    """The micro-batches of a step: with images, without, or one alone, so that the second process has none."""
    torch.manual_seed(step)
    images = make_batch([32 - step % 5, 20 + step % 7], [2, 1], [3 + step % 5, 1 + step % 3])
    text = make_batch([30, 18 + step % 3], [0, 0], [2, 1 + step % 4])
    if step in BAD:
        images.image_features[0] = math.nan
    return [[images, text], [text, images], [images], [text], [text, text]][step % 5]


def train(train_step, world=ALONE, context=nullcontext, steps=range(STEPS)):
    """The results of steps, each process with its share of the micro-batches."""
    results = []
    for step in steps:
        batches = batches_of(step)
        supervised, rows = sum(batch.supervised for batch in batches), sum(map(len, batches))
        images, own = sum(batch.images for batch in batches), batches[world.rank :: world.size]
        with context() if step > STEPS - 10 else nullcontext():
            pending = train_step(own, supervised, rows, 1e-3 if step < STEPS // 2 else 1e-4, images)
        results.append(pending.result)
    return [(result.loss, result.grad_norm, result.correct) for result in results]


def record_together() -> None:
    with meeting() as (world, answer), pytest.MonkeyPatch.context() as patch:
        group_experts(patch)
        for kind in KINDS:
            train_step, warnings = make_step(FOLDERS, kind), []
            tapes = record_steps(train_step, warnings.append, world)
            results = train(train_step, world, no_waits)
            answer[kind] = results, tensors_of(train_step), warnings, tapes.made, tapes.replayed


@pytest.mark.long
def test_steps_of_two_processes_are_recorded_and_are_those_of_one(tmp_path, monkeypatch):
    """Also where a process has no micro-batch, a step no image, and a gradient is not finite."""
    group_experts(monkeypatch)
    answers = together(record_together, tmp_path)
    for kind in KINDS:
        alone = make_step(tmp_path, kind)
        expected, weights = train(alone), tensors_of(alone)
        for results, tensors, warnings, made, replayed in (answer[kind] for answer in answers):
            assert not warnings
            assert made >= 3
            assert replayed > STEPS
            for step, (result, numbers) in enumerate(zip(results, expected, strict=True)):
                assert math.isfinite(result[0]) == (step not in BAD)
                assert result == pytest.approx(numbers, rel=1e-4, nan_ok=True), step
            for name in weights.keys() | tensors.keys():
                torch.testing.assert_close(tensors[name], weights[name], atol=1e-4, rtol=1e-4)
        (results, tensors, *_), (of_second, other, *_) = (answer[kind] for answer in answers)
        assert repr(results) == repr(of_second), "NaN is not equal to itself"
        assert same(tensors, other)


# --- runs -------------------------------------------------------------------------------------------------------------


class Plan(GivenBatches):
    """A data plan of steps; each process has its share of their micro-batches."""

    def __init__(self, steps, world, config):
        super().__init__([batch for batches in steps for batch in batches], config)
        self.steps, self.world, self.steps_per_epoch = steps, world, len(steps)

    def __getitem__(self, number):
        return self.steps[number % len(self.steps)][self.world.rank :: self.world.size]


class Saver:
    """Keeps copies of the weights instead of files; whether it is due, only the leading process knows."""

    def __init__(self, train_step, due):
        self.train_step, self.due, self.saved = train_step, due, {}

    def report(self, wait=False):
        pass

    def is_due(self, step, logged):
        return step in self.due

    def save(self, step, progress):
        assert progress["step"] == step
        self.saved[step] = tensors_of(self.train_step)

    def save_now(self, progress, finished):
        pass


class Validator:
    """Exchanges something, as a validation does, and keeps copies of the weights."""

    def __init__(self, train_step, world):
        self.train_step, self.world, self.copies = train_step, world, {}

    def __call__(self, model, encode, step):
        assert self.world.gather([step]) == [[step]] * self.world.size
        self.copies[step] = tensors_of(self.train_step)


class Order(Events):
    """Also keeps how many steps were launched when each was reported; after one, this process gets a signal."""

    def __init__(self, signal_at=0):
        super().__init__()
        self.launched, self.launches, self.signal_at = 0, {}, signal_at

    def batches(self, batches):
        self.launched += 1
        if self.launched == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def step(self, metrics, logged):
        super().step(metrics, logged)
        self.launches[metrics.step] = self.launched


def make_run(folder, world, steps, events, late, due=(), **options):
    model, unsaid = tiny_vlm(3), []
    config = make_config(model, folder, **{"lr": 1e-2} | options)
    train_step = TrainStep(config, model, FeatureCache(), world)
    if late:
        tapes = record_steps(train_step, events.warning if world.leads else unsaid.append, world)
        tapes.spoil = lambda tape: tape.calls.pop(len(tape.calls) // 2) if not world.leads else None
    run = Run(config, Plan(steps, world, config), train_step, events, world, unsaid=unsaid)
    run.validator = Validator(train_step, world) if config.val_every else None
    run.saver = Saver(train_step, due) if world.leads else None
    return run


def described(run, events):
    numbers = [(metrics.step, metrics.loss, metrics.grad_norm, metrics.token_accuracy) for metrics in events.steps]
    validated = run.validator.copies if run.validator else {}
    return {
        "numbers": numbers, "done": run.progress.done, "stopped": run.stopped_by, "bad": run.progress.counts.bad,
        "launches": events.launches, "saved": run.saver.saved if run.saver else {}, "validated": validated,
        "weights": tensors_of(run.train_step), "warnings": events.warnings,
    }  # fmt: skip


CASES = {
    "saves, validations and bad steps": lambda folder, world: (
        make_run(folder, world, [batches_of(step) for step in range(12)], Order(), world.size > 1, {4, 8}, val_every=5)
    ),
    "a signal to one process": lambda folder, world: (
        make_run(folder, world, [batches_of(step) for step in range(20, 30)], Order(4 * world.rank), world.size > 1)
    ),
    "a wrong recording of one process": lambda folder, world: make_run(
        folder, world, [batches_of(5 * step) for step in range(EAGER + 6)], Order(), world.size > 1
    ),
    "until every answer is right": lambda folder, world: make_run(
        folder, world, [[make_batch([9], [0], [1])] * 2] * 2, Order(), world.size > 1, epochs=50, until_right=True
    ),
}  # fmt: skip


def run_together() -> None:
    with meeting() as (world, answer):
        for name, case in CASES.items():
            torch.manual_seed(0)
            run = case(FOLDERS, world)
            run.run()
            answer[name] = described(run, run.listener)


@pytest.mark.long
def test_runs_of_two_processes_that_are_read_late_take_the_same_decisions(tmp_path):
    answers = together(run_together, tmp_path)
    for name, case in CASES.items():
        torch.manual_seed(0)
        run = case(tmp_path, ALONE)
        run.run()
        alone, (leading, other) = described(run, run.listener), (answer[name] for answer in answers)
        assert repr(leading["numbers"]) == repr(other["numbers"])
        assert same(leading["weights"], other["weights"])
        for key in ("done", "stopped", "bad", "launches"):
            assert leading[key] == other[key], key
        if name == "a signal to one process":
            assert leading["stopped"] is signal.SIGTERM
            assert leading["done"] == 4
            continue
        assert leading["done"] == alone["done"]
        for ours, theirs in zip(leading["numbers"], alone["numbers"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, nan_ok=True)
        if name == "until every answer is right":
            assert 4 < leading["done"] < 100
            continue
        if name == "a wrong recording of one process":
            [line] = leading["warnings"]
            assert line.startswith("process 1: steps are launched without a CUDA graph, ")
            assert line.endswith("it gives other results")
            continue
        assert leading["bad"] == alone["bad"] == 1
        assert leading["launches"] == {step: step + (step not in {4, 5, 8, 9, 10, 12}) for step in range(1, 13)}
        assert leading["saved"].keys() == alone["saved"].keys() == {4, 8}
        assert all(same(copy, other["validated"][step]) for step, copy in leading["validated"].items())
        assert leading["validated"].keys() == {5, 10, 12}
        assert leading["warnings"][-1].startswith("step 8: ")


# --- the exchange -----------------------------------------------------------------------------------------------------


def wait_long_together() -> None:
    with meeting() as (world, answer):
        distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT))  # behind the start, which a busy machine delays
        if world.leads:
            time.sleep(1.5 * LIMIT)
        world.await_leader()
        answer["ranks"] = world.gather([world.rank])
        gave_up, end = FOLDERS / "gave up", time.monotonic() + 10 * LIMIT
        while world.leads and not gave_up.exists() and time.monotonic() < end:
            time.sleep(0.01)
        try:
            world.gather([0])
        except RuntimeError as error:
            answer["other waits"] = str(error)
        if not world.leads:
            gave_up.touch()
            with pytest.raises(LostContact), world.contact():
                world.await_leader()


@pytest.mark.long
def test_the_others_wait_long_for_the_leading_process_until_it_is_lost(tmp_path):
    """Half an hour is gloo's limit of an exchange; this test has another."""
    leading, other = together(wait_long_together, tmp_path)
    assert leading["ranks"] == other["ranks"] == [[0], [1]]
    assert "imed out" in other["other waits"]


def reduce_together() -> None:
    with meeting() as (world, answer):
        for dtype in REDUCE_DTYPES:
            model = tiny_vlm(3, hidden_size=128, num_attention_heads=4)
            train_step = TrainStep(make_config(model, FOLDERS, reduce_dtype=dtype), model, FeatureCache(), world)
            own = batches_of(50)[world.rank :: world.size]
            losses, correct = train_step.backward(own, 12, 4)
            gradients = Gradients(train_step.trainable, world, dtype)
            gradients.exchange(sum(losses), correct, gradients.collect(), 3)
            train_step.optimiser.zero_grad()
            losses = [loss for loss, *_ in train(train_step, world, steps=range(-100, 0))]
            answer[dtype] = gradients.values, gradients.loss, losses


@pytest.mark.long
def test_gradients_that_are_exchanged_in_bf16_are_nearly_those_in_fp32(tmp_path):
    exact, rounded = REDUCE_DTYPES
    for answer in together(reduce_together, tmp_path):
        (gradient, loss, losses), (other, same_loss, other_losses) = answer[exact], answer[rounded]
        error = float(torch.linalg.vector_norm(other - gradient) / torch.linalg.vector_norm(gradient))
        cosine = float(torch.cosine_similarity(other.double(), gradient.double(), dim=0))
        gaps = [abs(there / here - 1) for here, there in zip(losses, other_losses, strict=True)]
        print(f"gradient {error:.2%}, cosine {cosine:.7f}, loss to 10 {max(gaps[:10]):.4%}, to 100 {max(gaps):.4%}")
        assert loss == same_loss, "only gradients are rounded"
        assert 0 < error < 0.004
        assert cosine > 0.99999
        assert max(gaps[:10]) < 0.001
        assert max(gaps) < 0.02
