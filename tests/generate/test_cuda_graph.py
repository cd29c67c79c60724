"""Steps that are recorded and replayed are those that are launched one by one.

A CUDA graph freezes all that Python decided and works on the same tensors again. So does a tape of torch's operators,
which stands in for one here.
"""

import gc
import inspect
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from minimind_v.core.generate import cuda_graph as replay
from minimind_v.core.generate.cuda_graph import EAGER, SPAN, Replay, record_cuda
from minimind_v.core.generate.fast_decoder import FastDecoder, FastExperts
from tests.generate.made import KINDS, make_model

SAME = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(params=KINDS.values(), ids=KINDS, scope="module")
def model(request):
    return make_model(seed=5, **request.param)


class Tape(TorchDispatchMode):
    """Notes torch's operators, and repeats them on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a recording cannot give a number to Python"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # else a view, or in place
                    old.copy_(new)


class Recorder:
    """Tapes work, and counts."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work, device):
        tape = Tape()
        with tape:
            work()
        self.recorded += 1

        def replay():
            self.replayed += 1
            tape.replay()

        return replay


@pytest.fixture
def pair(model):
    """A decoder that replays, one that does not, and the recorder."""
    recorder, decoders = Recorder(), [FastDecoder(model, torch.float32) for _ in range(2)]
    decoders[0].replay = Replay(recorder)
    for layer in decoders[0].layers:
        if isinstance(layer.mlp, FastExperts):
            layer.mlp.reads_choice = False  # as on a GPU
    return *decoders, recorder


def new_rows(pair, rows, length):
    """For each decoder a cache for each row."""
    return [[decoder.new_cache(1, length) for _ in range(rows)] for decoder in pair[:2]]


def read(pair, caches, x):
    """The prompts of all rows, x [1, T, D] each."""
    for decoder, rows in zip(pair, caches, strict=False):
        for row, cache in zip(x, rows, strict=True):
            decoder.read(row, cache)


def both(pair, caches, x):
    replayed, plain = (decoder.step(x, rows) for decoder, rows in zip(pair, caches, strict=False))
    torch.testing.assert_close(replayed, plain, **SAME)
    return replayed


@torch.no_grad()
def test_a_conversation(model, pair):
    width, recorder = model.config.hidden_size, pair[2]
    caches = new_rows(pair, 1, 2 * SPAN + 50)
    read(pair, caches, [torch.randn(1, SPAN - EAGER - 5, width)])
    kept = None
    for step in range(EAGER + 12):  # wider than the first recording towards the end
        logits = both(pair, caches, torch.randn(1, 1, width))
        assert kept is None or not torch.equal(kept[0], kept[1].zero_()), "the tokens make no difference"
        kept = logits, logits.clone()
        assert recorder.recorded == (step >= EAGER)
    assert recorder.replayed == 5, "and then the recording was outgrown"
    for [cache] in caches:
        cache.rewind(SPAN - 30)
    read(pair, caches, [torch.randn(1, 7, width)])
    for _ in range(EAGER + 3):  # what stood behind is not seen
        both(pair, caches, torch.randn(1, 1, width))
    assert recorder.recorded == 2


@torch.no_grad()
def test_rows_of_different_lengths_that_leave_and_join(model, pair):
    width, recorder = model.config.hidden_size, pair[2]
    prompts = [torch.randn(1, length, width) for length in (20, 3, 11)]
    caches = new_rows(pair, 3, 100)
    read(pair, caches, prompts)
    for left in (3, 2, 1, 2):
        if left < 3:
            caches = [rows[-left:] for rows in caches]
        if left > len(caches[0]):
            caches = [[*rows, *new] for rows, new in zip(caches, new_rows(pair, 1, 50), strict=True)]
            read(pair, [rows[-1:] for rows in caches], prompts[:1])
        for _ in range(EAGER + 3):
            both(pair, caches, torch.randn(left, 1, width))
    assert recorder.recorded == 4
    assert recorder.replayed == 12


@torch.no_grad()
def test_caches_have_recordings_of_their_own_which_go_with_them(model, pair):
    width, replay = model.config.hidden_size, pair[0].replay
    all_caches = [new_rows(pair, 1, 64) for _ in range(2)]
    for caches in all_caches:
        read(pair, caches, [torch.randn(1, 5, width)])
    for _ in range(EAGER + 3):
        for caches in all_caches:
            both(pair, caches, torch.randn(1, 1, width))
    assert len(replay._recordings) == 2
    del all_caches, caches
    gc.collect()
    assert len(replay._recordings) == 0


class StandIn:
    """For torch's CUDA graphs: takes what they take, and notes what happens."""

    takes = inspect.signature(torch.cuda.graph)

    def __init__(self, recordable):
        self.recordable, self.stream, self.current, self.done = recordable, "main", None, []

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.done.append("replayed"))

    @contextmanager
    def graph(self, *args, **options):
        self.takes.bind(*args, **options)
        self.stream = options["stream"]
        self.done.append(f"recording on {self.current}, {self.stream}")
        yield
        if not self.recordable:  # torch does not get to put the stream back
            raise RuntimeError("operation not permitted when stream is capturing")
        self.stream = "main"

    @contextmanager
    def device(self, device):
        self.current = device
        yield

    def Stream(self, device):
        return f"stream of {device}"

    def current_stream(self, device):
        return self.stream

    def set_stream(self, stream):
        self.stream = stream


@pytest.mark.parametrize("recordable", [True, False])
def test_what_cannot_be_recorded_is_done_step_by_step(monkeypatch, recordable):
    cuda, second = StandIn(recordable), torch.device("cuda:1")
    for name in ("CUDAGraph", "graph", "device", "Stream", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(replay, "_FAILED", [])
    monkeypatch.setattr(replay, "_stream", cuda.Stream)
    for _ in range(2):
        again = record_cuda(lambda: cuda.done.append("worked"), second)
        assert cuda.stream == "main"
        assert (again is None) == (not recordable)
        if again:
            again()
    once = ["recording on cuda:1, stream of cuda:1", "worked"]
    assert cuda.done == ([*once, "replayed"] * 2 if recordable else once), "what has failed is not tried again"


@torch.no_grad()
def test_without_recordings_answers_are_the_same(model, pair):
    width, caches = model.config.hidden_size, new_rows(pair, 1, 64)
    pair[0].replay = Replay(lambda work, device: None)
    read(pair, caches, [torch.randn(1, 5, width)])
    for _ in range(EAGER + 3):
        both(pair, caches, torch.randn(1, 1, width))


def test_a_decoder_goes_at_once_when_nobody_has_it(model):
    """A GPU that is full waits for no garbage collector."""
    gc.disable()
    try:
        decoder = FastDecoder(model, torch.float32)
        decoder.replay = Replay(lambda work, device: None)
        cache = decoder.new_cache(1, 64)
        with torch.no_grad():
            for _ in range(EAGER + 3):
                decoder.step(torch.randn(1, 1, model.config.hidden_size), [cache])
        gone = weakref.ref(decoder), weakref.ref(cache), weakref.ref(decoder.replay._recordings[cache])
        del decoder, cache
        assert [reference() for reference in gone] == [None] * 3
    finally:
        gc.enable()
