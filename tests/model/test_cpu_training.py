"""The written-out backward passes are those that autograd finds for the plain formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from minimind_v.core.model.kernels import cpu_training as fused
from minimind_v.core.model.kernels.cpu_training import (
    attend,
    attend_together,
    feed_forward,
    interleave,
    project,
    rms_norm,
)

HEADS, KV, HEAD_DIM, WIDTH, TIME = 4, 2, 6, 24, 7


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def plain_norm(x, weight):
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight


def plain_feed_forward(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def plain_project(x, q, k, v, angles):
    """Cosines and sines over two halves, as in the formula."""
    cos, sin = (torch.cat((part, part), dim=-1)[None, None] for part in (angles.cos(), angles.sin()))  # [1, 1, T, hd]
    q, k, v = (F.linear(x, weight).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for weight in (q, k, v))

    def rotated(part):
        first, second = part.chunk(2, dim=-1)
        return part * cos + torch.cat((-second, first), dim=-1) * sin

    return rotated(q) * HEAD_DIM**-0.5, rotated(k), v


def fused_project(x, q, k, v, angles):
    """Its heads come interleaved: put back in order to be compared."""
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None].repeat(1, 1, HEADS + KV, 1)
    turns[:, :, :HEADS] *= HEAD_DIM**-0.5
    q, k, v = project(x, q, k, v, turns)
    return *(part.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for part in (q, k)), v


def check_gradients(ours, plain, tensors, learns):
    """Values and gradients of all that learns, and no gradient of anything else."""
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    wanted = [tensor for tensor, one in zip(tensors, learns, strict=True) if one]
    reached = [n for n, part in enumerate(plain) if part.requires_grad]
    flows = [torch.randn_like(plain[n]) for n in reached]
    expected = torch.autograd.grad([plain[n] for n in reached], wanted, flows)
    found = torch.autograd.grad([ours[n] for n in reached], wanted, flows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def some_learn(count):
    return [learns for learns in itertools.product((True, False), repeat=count) if any(learns)]


@pytest.mark.parametrize("learns", some_learn(2))
def test_rms_norm(learns):
    torch.manual_seed(0)
    tensors = drawn(3, TIME, WIDTH), drawn(WIDTH)
    for tensor, one in zip(tensors, learns, strict=True):
        tensor.requires_grad_(one)
    check_gradients([rms_norm(*tensors, 1e-5)], [plain_norm(*tensors)], tensors, learns)


@pytest.mark.parametrize("learns", some_learn(4))
def test_feed_forward(learns):
    torch.manual_seed(1)
    tensors = drawn(9, WIDTH), drawn(32, WIDTH), drawn(32, WIDTH), drawn(WIDTH, 32)
    for tensor, one in zip(tensors, learns, strict=True):
        tensor.requires_grad_(one)
    check_gradients([feed_forward(*tensors)], [plain_feed_forward(*tensors)], tensors, learns)


@pytest.mark.parametrize("learns", some_learn(4))
def test_project(learns):
    torch.manual_seed(2)
    widths = HEADS * HEAD_DIM, KV * HEAD_DIM, KV * HEAD_DIM
    tensors = drawn(3, TIME, WIDTH), *(drawn(width, WIDTH) for width in widths)
    angles = torch.rand(TIME, HEAD_DIM // 2) * 6
    for tensor, one in zip(tensors, learns, strict=True):
        tensor.requires_grad_(one)
    check_gradients(fused_project(*tensors, angles), plain_project(*tensors, angles), tensors, learns)


def test_in_double_precision():
    """Numbers by torch's own finite differences."""
    torch.manual_seed(3)
    shapes = (5, 6), (8, 6), (8, 6), (6, 8)
    assert torch.autograd.gradcheck(feed_forward, [drawn(*shape, dtype=torch.double) for shape in shapes])
    turns = torch.polar(torch.ones(1, 5, 3, 3, dtype=torch.double), torch.rand(1, 5, 3, 3, dtype=torch.double))
    tensors = [drawn(*shape, dtype=torch.double) for shape in ((2, 5, 6), (12, 6), (6, 6), (6, 6))]
    assert torch.autograd.gradcheck(lambda *given: project(*given, turns), tensors)


def test_interleaved_halves_are_pairs():
    weight = torch.arange(2 * HEAD_DIM)[:, None].float()
    assert interleave(weight, HEAD_DIM).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_under_autocast_products_are_in_its_type():
    """Inputs and gradients stay in fp32; the values are near to those in fp32, and are not the same."""
    torch.manual_seed(4)
    x, gate, up, down = drawn(9, WIDTH), drawn(32, WIDTH), drawn(32, WIDTH), drawn(WIDTH, 32)
    q, k, v = drawn(HEADS * HEAD_DIM, WIDTH), drawn(KV * HEAD_DIM, WIDTH), drawn(KV * HEAD_DIM, WIDTH)
    angles = torch.rand(9, HEAD_DIM // 2) * 6

    def results():
        outs = feed_forward(x, gate, up, down), *fused_project(x[None], q, k, v, angles)
        flows = [torch.ones_like(part) for part in outs]
        return outs, torch.autograd.grad(outs, (x, gate, up, down, q, k, v), flows)

    exact, exact_gradients = results()
    with torch.autocast("cpu", torch.bfloat16):
        lower, gradients = results()
    assert {part.dtype for part in lower} == {torch.bfloat16}
    assert {part.dtype for part in gradients} == {torch.float32}
    for one, other in zip((*exact, *exact_gradients), (*lower, *gradients), strict=True):
        assert not torch.equal(one, other.float())
        assert F.cosine_similarity(one.flatten(), other.float().flatten(), dim=0) > 0.999


def plain_attend(q, k, v):
    """Written out, with a key for every query head."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    scores = (q @ k.mT).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("time", [1, 2, fused.BLOCK, fused.BLOCK + 1, 2 * fused.BLOCK + 17])
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_that_keeps_its_weights(time, heads):
    laid_out = torch.randn(2, time, heads + 4, 16)  # as `project` has them
    q, k, v = (part.transpose(1, 2).requires_grad_() for part in laid_out.split((heads, 2, 2), dim=2))
    ours, plain = attend(q, k, v), plain_attend(q, k, v)
    assert ours.grad_fn.name() == "_AttendBackward"
    check_gradients([ours], [plain], [q, k, v], [True] * 3)


def test_attention_that_keeps_nothing():
    """Of long rows, and where nothing is learnt."""
    q, k, v = (drawn(1, heads, fused.WEIGHTS_KEPT + 1, 8) for heads in (4, 2, 2))
    assert attend(q, k, v).grad_fn.name() != "_AttendBackward"
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v), plain_attend(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("time", [1, 5, fused.BLOCK + 9])
@pytest.mark.parametrize("kept", [True, False])
def test_attention_of_the_last_positions(monkeypatch, time, kept):
    """What all positions together would give for them."""
    monkeypatch.setattr(fused, "WEIGHTS_KEPT", 768 if kept else 0)
    earlier = 11
    q, k, v = (drawn(2, heads, earlier + time, 16) for heads in (4, 2, 2))
    ours, plain = attend(q[:, :, earlier:], k, v), plain_attend(q, k, v)[:, earlier:]
    assert (ours.grad_fn.name() == "_AttendBackward") == kept
    check_gradients([ours], [plain], [q, k, v], [True] * 3)


def test_rows_that_begin_alike():
    """What is projected and attended to once is what each row would have alone."""
    torch.manual_seed(5)
    rows, shared = 3, 4
    front, own = drawn(shared, WIDTH), drawn(rows, TIME - shared, WIDTH)
    weights = [(torch.randn(heads * HEAD_DIM, WIDTH) / 5).requires_grad_() for heads in (HEADS, KV, KV)]
    turns = torch.polar(torch.ones(1, TIME, HEADS + KV, HEAD_DIM // 2), torch.rand(1, TIME, 1, HEAD_DIM // 2) * 6)
    together = torch.cat([front, own.flatten(0, 1)])[None]
    found = attend_together(*project(together, *weights, turns, shared), shared, rows)[0]
    whole = torch.cat([front.expand(rows, -1, -1), own], dim=1)
    alone = attend(*project(whole, *weights, turns))
    expected = torch.cat([alone[0, :shared], alone[:, shared:].flatten(0, 1)])
    check_gradients([found], [expected], [front, own, *weights], [True] * 5)
