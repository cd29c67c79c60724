"""The compiled decoder is the decoder: one piece, for any length, with every gradient."""

import shutil
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from minimind_v.core.config.freeze import FREEZE_POLICIES
from minimind_v.core.model.kernels import cuda_moe
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.kernels.compiled import _batch, _passes, compile_decoder
from minimind_v.core.model.kv_cache import KVCache
from minimind_v.core.train.freeze import freeze
from tests.model.conftest import NORMED, NORMED_EXPERTS, tiny_vlm

KINDS = {
    "small, base": {},
    "moe": {"use_moe": True},
    "3v": NORMED,
    "3v-moe": NORMED_EXPERTS,
}


@pytest.fixture
def grouped(monkeypatch):
    """Experts are computed as on a GPU, and the compiler knows of nothing before."""
    monkeypatch.setattr(cuda_moe, "is_grouped", lambda *_: hasattr(F, "grouped_mm"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Of each kind the policies of both stages, of one all: a compiler takes seconds.
FREEZES = [
    (kind, policy)
    for kind, policy in product(KINDS, FREEZE_POLICIES)
    if policy in ("projector+last", "all") or kind == "3v-moe"
]


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request, grouped):
    """The sizes of a decoder."""
    return request.param


def new_decoder(policy="projector+last", **sizes):
    """With the parts of a GPU."""
    model = accelerate(tiny_vlm(**{"num_hidden_layers": 2} | sizes).train(), torch.device("cuda"))
    freeze(model, policy)
    return model.model


def precision_of(use_moe=False, **sizes):
    """Experts are grouped in bf16 only."""
    return partial(torch.autocast, "cpu", torch.bfloat16) if use_moe else nullcontext


@pytest.mark.long
@pytest.mark.parametrize(("name", "policy"), FREEZES)
def test_it_is_one_piece_of_real_numbers_for_all_lengths(name, policy, grouped):
    layers = 2 if policy.startswith("projector+") else 1  # whether some layers are frozen, or all are alike
    decoder = new_decoder(policy, **KINDS[name], num_hidden_layers=layers)
    precision, graphs = precision_of(**KINDS[name]), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    batches = [_batch(decoder, *shape) for shape in ((2, 48), (3, 80), (2, 57), (1, 33))]
    expected = [_passes(decoder, precision, batch) for batch in batches]
    decoder.compile(dynamic=True, fullgraph=True, backend=backend)
    results = [_passes(decoder, precision, batch) for batch in batches]
    assert len(graphs) <= 2, "a single row may have its own"
    for tensors, others in zip(results, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(tensors, others, strict=True))
    values = [
        node.meta["example_value"] for graph in graphs for node in graph.graph.nodes if "example_value" in node.meta
    ]
    assert sum(isinstance(value, torch.Tensor) for value in values) > 50
    assert not any(value.is_complex() for value in values if isinstance(value, torch.Tensor))


@pytest.mark.long
def test_forward_and_backward_are_those_of_the_decoder(kind):
    layers = 1 if "use_moe" in kind else 2  # a layer of experts takes longest
    decoder, precision = new_decoder(**kind, num_hidden_layers=layers), precision_of(**kind)
    batches = [_batch(decoder, *shape) for shape in ((2, 48), (3, 80), (2, 57))]
    expected = [_passes(decoder, precision, batch) for batch in batches]
    assert compile_decoder(decoder, precision, "aot_eager") is None
    for batch, others in zip(batches, expected, strict=True):
        tensors = _passes(decoder, precision, batch)
        assert len(tensors) == len(others) > 5
        for tensor, other in zip(tensors, others, strict=True):
            gap = torch.linalg.vector_norm(tensor - other) / torch.linalg.vector_norm(other).clamp(min=1e-9)
            assert gap < (1e-5 if precision is nullcontext else 0.02)


@pytest.mark.long
@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")
def test_experts_that_are_moved_once_it_is_compiled_are_those_that_it_computes(grouped):
    decoder, precision = new_decoder("all", use_moe=True, num_hidden_layers=1), precision_of(use_moe=True)
    batch = _batch(decoder, 2, 48)
    before = _passes(decoder, precision, batch)
    decoder.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    _passes(decoder, precision, batch)
    for layer in decoder.layers:
        for weight in (layer.mlp.experts[1].up_proj.weight, layer.mlp.experts[2].down_proj.weight):
            weight.data = 2 * weight.detach()
    tensors = _passes(decoder, precision, batch)
    decoder._compiled_call_impl = None
    expected = _passes(decoder, precision, batch)
    assert not torch.equal(expected[0], before[0])
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0.02 * float(other.abs().max()))


@pytest.mark.long
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_only_passes_with_gradients_are_compiled(mode):
    torch._dynamo.reset()
    decoder, graphs = new_decoder(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x, mask, positions = _batch(decoder, 2, 20)
    expected, _ = decoder(x, mask, None, positions)
    assert compile_decoder(decoder, nullcontext, backend) is None
    compiled = len(graphs)
    assert compiled
    with mode():
        hidden, _ = decoder.eval()(x, mask, None, positions)
        decoder(x, None, KVCache(decoder.config, 2, 30, x.device, x.dtype))
    assert torch.equal(hidden, expected)
    assert len(graphs) == compiled
    torch._dynamo.reset()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler here")
def test_inductors_kernels_compute_the_same(monkeypatch):
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # few kernels
    torch._dynamo.reset()
    decoder = new_decoder(**NORMED, num_hidden_layers=1)  # g++ takes seconds for each kernel
    batch = _batch(decoder, 2, 57)
    expected = _passes(decoder, nullcontext, batch)
    assert compile_decoder(decoder, nullcontext) is None
    for tensor, other in zip(_passes(decoder, nullcontext, batch), expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=2e-6 * max(1, float(other.abs().max())))
    torch._dynamo.reset()


@pytest.mark.long
@pytest.mark.parametrize("suppressed", [False, True], ids=["", "after another was compiled"])
def test_what_cannot_be_compiled_stays_as_it_is(suppressed):
    decoder = new_decoder()
    batch = _batch(decoder, 2, 20)
    expected = _passes(decoder, nullcontext, batch)

    def backend(graph, inputs):
        raise RuntimeError("no compiler\nhere")

    with torch._dynamo.config.patch(suppress_errors=suppressed):
        reason = compile_decoder(decoder, nullcontext, backend)
    assert "no compiler here" in reason
    assert all(torch.equal(*pair) for pair in zip(_passes(decoder, nullcontext, batch), expected, strict=True))


@pytest.mark.long
def test_what_computes_something_else_is_not_used():
    decoder = new_decoder()
    batch = _batch(decoder, 2, 20)
    expected = _passes(decoder, nullcontext, batch)
    draws = torch.get_rng_state()

    def backend(graph, inputs):
        return lambda *inputs: [1.5 * value if isinstance(value, torch.Tensor) else value for value in graph(*inputs)]

    assert compile_decoder(decoder, nullcontext, backend) == "it computes something else"
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(*pair) for pair in zip(_passes(decoder, nullcontext, batch), expected, strict=True))
