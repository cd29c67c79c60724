"""Steps that are recorded and replayed are those that are launched one by one.

A CUDA graph freezes all that Python decided and works on the same tensors again. So does a trace of torch's operators,
which stands in for one here.
"""

import gc
import inspect
from contextlib import contextmanager

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from minimind_v.core.generate.decoder import FastDecoder, FastExperts
from minimind_v.core.generate.replay import EAGER, SPAN, Replay, record_cuda
from tests.generate.made import KINDS, make_model

SAME = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(params=KINDS.values(), ids=KINDS, scope="module")
def model(request):
    return make_model(seed=5, **request.param)


class Recorder:
    """Traces work, and counts."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        def traced():
            work()
            return torch.zeros(())

        graph = make_fx(traced)()
        self.recorded += 1

        def replay():
            self.replayed += 1
            graph()

        return replay


@pytest.fixture
def pair(model):
    """A decoder that replays, one that does not, and the recorder."""
    recorder, decoders = Recorder(), [FastDecoder(model, torch.float32) for _ in range(2)]
    decoders[0].replay = Replay(decoders[0]._step, recorder)
    for layer in decoders[0].layers:
        if isinstance(layer.mlp, FastExperts):
            layer.mlp.chosen_are_told = False  # as on a GPU
    return *decoders, recorder


def both(pair, caches, x, mask=None):
    one, other = (decoder.read(x, cache, mask) for decoder, cache in zip(pair, caches, strict=False))
    torch.testing.assert_close(one, other, **SAME)
    return one


@torch.no_grad()
def test_a_conversation(model, pair):
    width, recorder = model.config.hidden_size, pair[2]
    caches = [decoder.new_cache(1, 2 * SPAN + 50) for decoder in pair[:2]]
    both(pair, caches, torch.randn(1, SPAN - EAGER - 5, width))
    kept = None
    for step in range(EAGER + 12):  # wider than the first recording towards the end
        logits = both(pair, caches, torch.randn(1, 1, width))
        assert kept is None or not torch.equal(kept[0], kept[1].zero_()), "the tokens make no difference"
        kept = logits, logits.clone()
        assert recorder.recorded == (step >= EAGER)
    assert recorder.replayed == 5, "and then the recording was outgrown"
    for cache in caches:
        cache.rewind(SPAN - 30)
    both(pair, caches, torch.randn(1, 7, width))
    for _ in range(EAGER + 3):  # what stood behind is not seen
        both(pair, caches, torch.randn(1, 1, width))
    assert recorder.recorded == 2


@torch.no_grad()
def test_rows_of_different_lengths_that_leave(model, pair):
    width, recorder = model.config.hidden_size, pair[2]
    mask = torch.arange(20) < torch.tensor([20, 3, 11])[:, None]
    caches = [decoder.new_cache(3, 100) for decoder in pair[:2]]
    both(pair, caches, torch.randn(3, 20, width), mask)
    for left in (3, 2, 1):
        for _ in range(EAGER + 3):
            both(pair, caches, torch.randn(left, 1, width))
        if left > 1:
            for cache in caches:
                cache.drop(0)
    assert recorder.recorded == 3
    assert recorder.replayed == 9


@torch.no_grad()
def test_caches_have_recordings_of_their_own_which_go_with_them(model, pair):
    width, replay = model.config.hidden_size, pair[0].replay
    all_caches = [[decoder.new_cache(1, 64) for decoder in pair[:2]] for _ in range(2)]
    for caches in all_caches:
        both(pair, caches, torch.randn(1, 5, width))
    for _ in range(EAGER + 3):
        for caches in all_caches:
            both(pair, caches, torch.randn(1, 1, width))
    assert len(replay._recordings) == 2
    del all_caches, caches
    gc.collect()
    assert len(replay._recordings) == 0


@pytest.mark.parametrize("recordable", [True, False])
def test_what_cannot_be_recorded_is_done_step_by_step(monkeypatch, recordable):
    """With a stand-in for torch's CUDA graphs, that takes what they take."""
    takes, done = inspect.signature(torch.cuda.graph), []

    class Graph:
        def replay(self):
            done.append("replayed")

    @contextmanager
    def capture(*args, **options):
        takes.bind(*args, **options)
        yield
        if not recordable:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    again = record_cuda(lambda: done.append("worked"))
    again()
    assert done == ["worked", "replayed" if recordable else "worked"]
