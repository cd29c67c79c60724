"""A lone GPU's steps ask it nothing, and are read when the next one is launched: the run is the same."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count

import pytest
import torch

from minimind_v.core.errors import DataError, RunError
from minimind_v.core.train.progress import PATIENCE
from tests.conftest import Events, given_run
from tests.model.conftest import tiny_vlm
from tests.train.late import (
    MODELS,
    POLICIES,
    group_experts,
    make_batch,
    make_config,
    make_step,
    no_waits,
    record_steps,
    same,
    tensors_of,
)

# --- no waits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [False, True], ids=["features", "pixels"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_asks_a_gpu_nothing(kind, policy, pixels, tmp_path, monkeypatch):
    group_experts(monkeypatch)
    train_step = make_step(tmp_path, kind, POLICIES[policy], dtype="bfloat16" if "moe" in kind else "float32")
    record_steps(train_step, pytest.fail)
    mixed, text = make_batch([20, 11], [1, 2], [5, 1], pixels), make_batch([9, 8], [0, 0], [4, 4])
    for batches in ([mixed, text], [mixed, text], [text]):
        supervised = sum(batch.supervised for batch in batches)
        with no_waits():
            step = train_step(batches, supervised, 2 * len(batches), 1e-3)
        assert step.result.finite
        assert step.result.grad_norm > 0


def test_the_mode_finds_what_waits():
    x, mask = torch.ones(4), torch.tensor([True, False, True, False])
    for wait in (
        lambda: float(x.sum()), lambda: x.tolist(), lambda: x[mask], lambda: x.masked_select(mask), lambda: bool(x[0]),
        lambda: mask.nonzero(), lambda: torch.equal(x, x), lambda: x.clone().__setitem__(mask, torch.ones(2)),
    ):  # fmt: skip
        with no_waits(), pytest.raises(AssertionError, match="waits for the device"):
            wait()


# --- one step late ----------------------------------------------------------------------------------------------------


class Order(Events):
    """Also keeps the order in which steps are launched and reported."""

    def __init__(self):
        super().__init__()
        self.order = []

    def batches(self, batches):
        self.order.append("launch")

    def step(self, metrics, logged):
        super().step(metrics, logged)
        self.order.append(metrics.step)

    def launches(self):
        """How many steps were launched when each was reported."""
        return {step: self.order[:place].count("launch") for place, step in enumerate(self.order) if step != "launch"}


class MemorySaver:
    """Saves copies of the weights instead of files."""

    def __init__(self, train_step, every=0):
        self.train_step, self.every, self.saved = train_step, every, {}

    def report(self, wait=False):
        pass

    def is_due(self, step, logged):
        return bool(self.every) and step % self.every == 0

    def save(self, step, progress):
        assert progress["step"] == step
        self.save_now(progress, finished=False)

    def save_now(self, progress, finished):
        self.saved[progress["step"]] = tensors_of(self.train_step)


class MemoryValidator:
    """Copies the weights that it is to measure."""

    def __init__(self, train_step):
        self.train_step, self.copies = train_step, {}

    def __call__(self, model, encode, step):
        self.copies[step] = tensors_of(self.train_step)


@pytest.fixture
def make_run(tmp_path):
    """A run over batches, read late or at once."""

    def make(batches, late, events, every=0, **options):
        model = tiny_vlm(3)
        run = given_run(make_config(model, tmp_path, lr=1e-2, **options), model, batches, events)
        run.train_step.late = late
        run.saver, run.validator = (
            MemorySaver(run.train_step, every),
            MemoryValidator(run.train_step) if run.config.val_every else None,
        )
        return run

    return make


def numbers_of(events):
    return [replace(metrics, seconds=0.0, data_seconds=0.0) for metrics in events.steps]


def batches_with(bad=(), number=8):
    torch.manual_seed(0)
    batches = [make_batch([12, 9 + n % 3], [1, 1], [3, 2 + n % 3]) for n in range(number)]
    for n in bad:
        batches[n - 1].image_features[0] = math.nan
    return batches


def spoil_gradients(run, bad):
    """Let the gradient of these steps be infinite, though their loss is not."""
    steps = count(1)
    run.train_step.trainable[0].register_hook(lambda gradient: math.inf * gradient if next(steps) in bad else gradient)


@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [(), (1,), (3,), (8,), (3, 4, 6)])
def test_steps_that_are_read_late_are_the_same(bad, spoiled, make_run):
    at_once, late = Order(), Order()
    runs = [
        make_run(batches_with(bad if spoiled == "loss" else ()), events is late, events, every=4, val_every=3)
        for events in (at_once, late)
    ]
    for run in runs if spoiled == "gradient" else ():
        spoil_gradients(run, bad)
    summaries = [run.run() for run in runs]
    assert repr(numbers_of(late)) == repr(numbers_of(at_once))  # NaN is not equal to itself
    good = [n not in bad for n in range(1, 9)]
    assert [math.isfinite(step.grad_norm) for step in late.steps] == good
    assert [math.isfinite(step.loss) for step in late.steps] == (good if spoiled == "loss" else [True] * 8)
    assert late.warnings == at_once.warnings
    assert sum("step skipped" in line for line in late.warnings) == len(bad)
    assert summaries[0].bad_steps == summaries[1].bad_steps == len(bad)
    assert runs[0].progress.counts.skipped == runs[1].progress.counts.skipped == (8 in bad)
    assert runs[0].saver.saved.keys() == runs[1].saver.saved.keys() == {4, 8}
    assert all(same(saved, runs[1].saver.saved[step]) for step, saved in runs[0].saver.saved.items())
    launches = late.launches()
    assert launches[1] == 2, "the first step is read behind the second's launch"
    assert all(launches[step] == step for step in (3, 4, 6, 8)), "before a save, a validation and the end, at once"
    assert runs[0].validator.copies.keys() == runs[1].validator.copies.keys() == {3, 6, 8}
    assert all(same(copy, runs[1].validator.copies[step]) for step, copy in runs[0].validator.copies.items())


def test_the_step_behind_a_bad_one_is_read_at_once(make_run):
    events = Order()
    make_run(batches_with((3,)), late=True, events=events).run()
    assert events.launches() == {1: 2, 2: 3, 3: 4, 4: 4, 5: 6, 6: 7, 7: 8, 8: 8}


def test_a_run_ends_after_the_same_bad_step(make_run):
    saved = []
    for late in (False, True):
        events = Order()
        run = make_run(batches_with(range(3, 9)), late, events)
        with pytest.raises(RunError, match=f"{PATIENCE} steps in a row"):
            run.run()
        assert run.progress.done == 2 + PATIENCE - 1
        saved.append(run.saver.saved)
    assert saved[0].keys() == saved[1].keys()
    assert all(same(tensors, saved[1][step]) for step, tensors in saved[0].items())


def test_data_that_ends_a_run_does_not_lose_the_step_before(make_run):
    events = Order()
    run = make_run(batches_with(), late=True, events=events)
    load = run.plan.__class__.__getitem__

    class Broken(run.plan.__class__):
        def __getitem__(self, number):
            if number == 4:
                raise DataError("no more rows")
            return load(self, number)

    run.plan.__class__ = Broken
    with pytest.raises(DataError):
        run.run()
    expected = make_run(batches_with(), late=False, events=Events(), every=4)
    expected.run()
    assert run.progress.done == len(events.steps) == 4
    assert same(run.saver.saved[4], expected.saver.saved[4])
