"""Recorded steps are those that are launched kernel by kernel.

A tape of torch's operators stands in for a CUDA graph: it, too, freezes what Python decided and works on the same
tensors again.
"""

from __future__ import annotations

import gc
import math
import random
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from minimind_v.core import cuda_graph
from minimind_v.core.cuda_graph import EAGER
from minimind_v.core.train.graph import padded_count, padded_length, peak_with_recordings
from minimind_v.core.train.resume import named_trainable, pack, unpack
from tests.conftest import Events
from tests.model.conftest import tiny_vlm
from tests.train.late import (
    MODELS,
    POLICIES,
    P,
    group_experts,
    make_batch,
    make_config,
    make_step,
    no_waits,
    record_steps,
    same,
    tensors_of,
)  # fmt: skip

CLOSE = {"atol": 5e-6, "rtol": 1e-5}  # of weights after many steps: AdamW makes much of small gradients


@pytest.fixture
def warnings():
    return []


def shapes(count, text=False):
    """Micro-batches of one padded shape, of different lengths and answers."""
    torch.manual_seed(5)
    images = [0, 0] if text else [2, 1]
    return [make_batch([31 - n % 5, 20 + n % 7], images, [3 + n % 5, 1 + n % 3]) for n in range(count)]


def pair(tmp_path, kind="small", policy="all", **options):
    """A step that is launched kernel by kernel on exact shapes, and an equal one to be recorded."""
    return [make_step(tmp_path, kind, policy, **options) for _ in range(2)]


def train(train_step, steps):
    """The numbers of steps over lists of micro-batches."""
    numbers = []
    for count, batches in enumerate(steps):
        supervised, rows = sum(batch.supervised for batch in batches), sum(map(len, batches))
        numbers.append(train_step(batches, supervised, rows, 1e-3 / (count + 1)).result)
    return numbers


def assert_same(left, right):
    for one_step, other in zip(left, right, strict=True):
        assert other.loss == pytest.approx(one_step.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one_step.grad_norm, rel=1e-4)
        assert other.correct == one_step.correct
        assert other.batch_losses == pytest.approx(one_step.batch_losses, rel=1e-5)


def assert_same_weights(left, right):
    mine, other = tensors_of(left), tensors_of(right)
    for name in mine.keys() | other.keys():
        torch.testing.assert_close(mine[name], other[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_padded_sizes():
    assert [padded_length(n) for n in (1, 32, 33, 512, 513, 640)] == [32, 32, 64, 512, 576, 640]
    sizes = sorted({padded_count(n) for n in range(1, 5000)})
    assert sizes[:6] == [16, 32, 48, 64, 80, 112]
    assert all(padded_count(n) >= n for n in range(1, 5000))
    assert all(later <= 1.5 * size for size, later in pairwise(sizes[1:]))


# Lengths, images and supervised tokens of rows: with one image to fill up, with none, and without a position for it.
@pytest.mark.parametrize(
    "rows", [([50, 33, 7], [2, 0, 1], [30, 9, 3]), ([50, 33], [1, 1], [30, 9]), ([32, 64, 64], [1, 1, 3], [9, 2, 8])]
)
@pytest.mark.parametrize("kind", MODELS)
def test_a_padded_micro_batch_has_the_same_gradients(kind, rows, tmp_path, warnings):
    exact, padded = pair(tmp_path, kind)
    record_steps(padded, warnings.append)
    batch = make_batch(*rows)
    supervised = batch.supervised
    losses, correct = exact.backward([batch], supervised, len(batch))
    padded([batch], supervised, len(batch), 0.0)  # makes room for gradients
    for gradient in padded.graphs._gradients.views:
        gradient.zero_()
    padded.graphs._pass(batch)()
    torch.testing.assert_close(padded.graphs._share_of_loss, losses[0], atol=1e-6, rtol=1e-6)
    assert padded.graphs._correct == correct
    for weight, gradient in zip(exact.trainable, padded.graphs._gradients.views, strict=True):
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MODELS)
def test_ten_replayed_steps_equal_those_on_exact_shapes(kind, policy, tmp_path, warnings, monkeypatch):
    group_experts(monkeypatch)
    eager, recorded = pair(tmp_path, kind, POLICIES[policy])
    tapes, steps = record_steps(recorded, warnings.append), [[batch] for batch in shapes(EAGER + 11)]
    assert_same(train(eager, steps), train(recorded, steps))
    assert_same_weights(eager, recorded)
    assert not warnings
    assert (tapes.made, tapes.replayed) == (2, 22), "the passes and the update"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["small", "moe"])
def test_nothing_of_autograd_outlives_a_pass(kind, dtype, tmp_path, warnings, monkeypatch):
    """What sums a weight's gradient belongs to the stream of its pass: one of an eager pass would spoil a recording."""
    recorded, grad = make_step(tmp_path, kind, dtype=dtype), torch.autograd.grad
    record_steps(recorded, warnings.append)

    def mark(loss, weights, **options):
        for weight in weights:
            torch.autograd.graph.get_gradient_edge(weight).node.metadata["of this pass"] = True
        return grad(loss, weights, **options)

    monkeypatch.setattr(torch.autograd, "grad", mark)
    gc.disable()  # also no circle holds one
    try:
        train(recorded, [shapes(1)])
        nodes = [torch.autograd.graph.get_gradient_edge(weight).node for weight in recorded.trainable]
        assert not any("of this pass" in node.metadata for node in nodes)
    finally:
        gc.enable()


def test_weights_are_cast_anew_at_each_replay(tmp_path, warnings):
    """Autocast keeps casts of weights, but for no longer than a pass."""
    eager, recorded = pair(tmp_path, dtype="bfloat16")
    tapes, steps = record_steps(recorded, warnings.append), [shapes(1)] * (EAGER + 8)
    losses = [[number.loss for number in train(train_step, steps)] for train_step in (eager, recorded)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1][-1] < 0.9 * losses[1][EAGER + 1], "it learns"
    assert tapes.replayed == 16
    assert not warnings


@pytest.mark.parametrize(
    "kind", ["small", *(pytest.param(kind, marks=pytest.mark.long) for kind in MODELS if kind != "small")]
)
def test_micro_batches_of_several_shapes_with_and_without_images(kind, tmp_path, warnings, monkeypatch):
    """A step without an image leaves the projector and its moments as they are."""
    group_experts(monkeypatch)
    eager, recorded = pair(tmp_path, kind)
    tapes = record_steps(recorded, warnings.append)
    wide = [make_batch([50, 40], [1, 0], [9, 2]) for _ in range(30)]
    images, text = shapes(30), shapes(30, text=True)
    steps = [([images[n], wide[n]], [text[n], images[n]], [text[n]])[n % 3] for n in range(30)]
    assert_same(train(eager, steps), train(recorded, steps))
    assert_same_weights(eager, recorded)
    assert tapes.made == 5, "three shapes, updates with and without the projector"
    assert not warnings


def test_any_mix_of_rows_and_images_needs_few_recordings(tmp_path, warnings):
    """All that a micro-batch of two rows can hold, many times in any order."""
    train_step, draw = make_step(tmp_path), random.Random(3)
    record_steps(train_step, warnings.append)
    graphs, keys = train_step.graphs, set()
    graphs.graphs.run = lambda key, *work: keys.add(key)
    for _ in range(300):
        images = [draw.randrange(8), draw.randrange(8)]
        lengths = [P * count + 2 + draw.randrange(64 - 8 * P) for count in images]
        graphs._pass(make_batch(lengths, images, [1, 1]))()
    lengths, counts = (32, 64, 96), (0, 1, 2, 4, 8, 16)
    assert len(keys) <= len(lengths) * len(counts)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MODELS)
def test_padding_and_replaying_ask_a_gpu_nothing(kind, policy, tmp_path, warnings, monkeypatch):
    group_experts(monkeypatch)
    train_step = make_step(tmp_path, kind, POLICIES[policy])
    tapes = record_steps(train_step, warnings.append)
    for n, batches in enumerate(zip(shapes(EAGER + 4), shapes(EAGER + 4, text=True), strict=True)):
        for batch in batches:
            supervised = batch.supervised
            with nullcontext() if n in (EAGER - 1, EAGER) else no_waits():  # where it is recorded, and compared
                train_step([batch], supervised, 2, 1e-3)
    assert (tapes.made, tapes.replayed) == (4, 16), "the passes and the update, with images and without"
    assert not warnings


def test_images_that_are_encoded_for_a_step(tmp_path, warnings):
    eager, recorded = pair(tmp_path)
    tapes = record_steps(recorded, warnings.append)
    steps = [[make_batch([31 - n % 3, 20], [2, 1], [3, 2], pixels=True)] for n in range(EAGER + 5)]
    assert_same(train(eager, steps), train(recorded, steps))
    assert_same_weights(eager, recorded)
    assert tapes.made == 2
    assert not warnings


@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
def test_a_bad_step_is_skipped_by_a_recording_too(spoiled, tmp_path, warnings):
    train_step = make_step(tmp_path)
    tapes, batches = record_steps(train_step, warnings.append), shapes(EAGER + 8)
    bad = {0, 3, EAGER, EAGER + 3, EAGER + 4, EAGER + 7}  # among them the first replay, which proves nothing
    adamw = train_step.graphs._adamw

    def spoil(reached):
        train_step.graphs._gradients.views[0].view(-1)[0] = math.inf
        return adamw(reached)

    for n, batch in enumerate(batches):
        if n in bad and spoiled == "loss":
            batch.image_features[0] = math.nan
        train_step.graphs._adamw = spoil if n in bad and spoiled == "gradient" else adamw
        before = tensors_of(train_step)
        [result] = train(train_step, [[batch]])
        assert result.finite == (n not in bad)
        assert math.isfinite(result.loss) == (n not in bad or spoiled == "gradient")
        after = tensors_of(train_step)
        moments = [after.pop(name) for name in after.keys() - before.keys()]  # which the first step makes
        assert same(before, after) == (n in bad)
        assert n not in bad or not any(moment.any() for moment in moments)
    assert tapes.replayed > 2
    assert not warnings


@pytest.mark.parametrize("trouble", ["wrong", "stale"])
def test_a_recording_that_is_wrong_is_not_used_and_that_is_said_once(trouble, tmp_path, warnings):
    eager, recorded = pair(tmp_path)
    tapes, steps = record_steps(recorded, warnings.append), [[batch] for batch in shapes(EAGER + 6)]
    if trouble == "wrong":  # a kernel is missing
        tapes.spoil = lambda tape: tape.calls.pop(len(tape.calls) // 2)
    if trouble == "stale":  # what it reads is not what later steps write
        tapes.spoil = lambda tape: recorded.graphs._inputs.clear()
    assert_same(train(eager, steps), train(recorded, steps))
    assert_same_weights(eager, recorded)
    reason = "it gives other results"
    assert warnings == [f"steps are launched without a CUDA graph, which takes longer: {reason}"]


def test_memory_that_recordings_take_is_given_back(tmp_path, warnings):
    eager, recorded = pair(tmp_path)
    record_steps(recorded, warnings.append)
    steps = [[batch] for batch in shapes(EAGER + 6)]
    wide, full = [make_batch([50, 40], [1, 1], [9, 2])], []

    def run_out(*call):
        if not full:
            full.append(True)
            raise torch.OutOfMemoryError

    numbers = train(recorded, steps)
    recorded.model.register_forward_pre_hook(run_out)
    assert_same(train(eager, steps), numbers)
    assert_same(train(eager, [wide]), train(recorded, [wide]))
    assert_same_weights(eager, recorded)
    assert len(warnings) == 1
    assert "there is no memory for them" in warnings[0]
    assert not recorded.graphs.graphs.recorded


class FullMemory(TorchDispatchMode):
    """Has no memory for the tensor behind so many new ones."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        held = {id_of(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        self.room -= any(
            isinstance(value, torch.Tensor) and id_of(value) not in held for value in pytree.tree_leaves(result)
        )
        if self.room < 0:
            raise torch.OutOfMemoryError
        return result


def id_of(tensor):
    return tensor.untyped_storage().data_ptr()


def test_work_that_runs_out_of_memory_has_changed_nothing(tmp_path, warnings):
    """So that it may be done again: whichever tensor has no room, the first of a step or the last."""
    train_step = make_step(tmp_path)
    record_steps(train_step, warnings.append)
    graphs, batch = train_step.graphs, shapes(1)[0]
    graphs([batch], batch.supervised, 2, 1e-2)
    passes, update = graphs._pass(batch), graphs._adamw(tuple(range(len(graphs.trainable))))

    def changed():
        gradients = {str(number): gradient.clone() for number, gradient in enumerate(graphs._gradients.views)}
        return gradients | tensors_of(train_step)

    for work in (passes, update):
        passes()
        for weight, gradient in zip(graphs.trainable, graphs._gradients.views, strict=True):
            weight.grad = gradient
        before, most = changed(), 0
        with FullMemory(10**6) as memory:
            work()
        most = 10**6 - memory.room
        assert not same(before, changed())
        for room in {*range(0, most, 100), *range(max(0, most - 20), most)}:
            passes()
            before = changed()
            with FullMemory(room), pytest.raises(torch.OutOfMemoryError):
                work()
            assert same(before, changed()), f"{room} of {most}"


def test_memory_is_counted_with_recordings_and_their_comparison(monkeypatch):
    for name, taken in {"max_memory_allocated": 500, "memory_allocated": 200}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, taken=taken: taken)
    assert peak_with_recordings(torch.device("cuda"), 10) == 800, "what the passes take, once more"
    assert peak_with_recordings(torch.device("cuda"), 50) == 900


def test_moments_are_those_that_torch_makes(tmp_path, warnings):
    eager, recorded = pair(tmp_path)
    record_steps(recorded, warnings.append)
    for train_step in (eager, recorded):
        train(train_step, [[batch] for batch in shapes(1)])
    for mine, other in zip(eager.optimiser.state.values(), recorded.optimiser.state.values(), strict=True):
        kinds = [{name: (tensor.dtype, tensor.shape) for name, tensor in state.items()} for state in (mine, other)]
        assert kinds[0] == kinds[1]
        assert list(mine) == list(other)


def test_recordings_share_their_inputs_and_are_few(tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(cuda_graph, "MOST", 3)
    train_step = make_step(tmp_path)
    tapes = record_steps(train_step, warnings.append)
    for answer in (3, 20, 35, 50):
        for _ in range(EAGER + 2):
            train(train_step, [[make_batch([60, 60], [1, 1], [answer, answer])]])
    assert tapes.made == 3
    assert len(train_step.graphs._inputs) == 4 + 2 * 4, "ids, mask, features and places once, answers by their size"
    assert not warnings


def test_a_run_that_is_recorded_resumes_from_its_state(tmp_path, warnings):
    whole, first, rest = (make_step(tmp_path) for _ in range(3))
    for train_step in (whole, first, rest):
        record_steps(train_step, warnings.append)
    steps = [[batch] for batch in shapes(EAGER + 6)]
    expected = train(whole, steps)
    numbers = train(first, steps[: EAGER + 3])
    state = {
        name: tensor.detach().clone() for name, tensor in pack(named_trainable(first.model), first.optimiser).items()
    }
    unpack(state, named_trainable(rest.model), rest.optimiser)
    for count, batches in enumerate(steps[EAGER + 3 :], EAGER + 3):
        numbers.append(rest(batches, batches[0].supervised, 2, 1e-3 / (count + 1)).result)
    assert numbers == expected, "on a CPU to the last bit"


def test_a_whole_run_is_recorded(tmp_path, run_over):
    """Through the loop, with its reading one step late."""
    runs = [run_over(make_config(tiny_vlm(3), tmp_path, lr=1e-2), tiny_vlm(3), shapes(EAGER + 6)) for _ in range(2)]
    runs[0].listener, events = Events(), Events()
    runs[1].listener = events
    for run in runs:
        run.progress.listener = run.listener
    tapes = record_steps(runs[1].train_step, events.warning)
    for run in runs:
        run.run()
    assert [step.step for step in events.steps] == list(range(1, EAGER + 7))
    assert [step.loss for step in events.steps] == pytest.approx(
        [step.loss for step in runs[0].listener.steps], rel=1e-5
    )
    assert tapes.made == 2
    assert not events.warnings
