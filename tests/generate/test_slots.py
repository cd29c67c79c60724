"""Rows in slots get what each gets by itself, drawn where the logits are; what was recorded is used again.

A CUDA graph freezes all that Python decided and works on the same tensors again. So does a tape of torch's operators,
which stands in for one here.
"""

import gc
import weakref

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from minimind_v.core.cuda_graph import EAGER
from minimind_v.core.generate.engine import Engine
from minimind_v.core.generate.fast_decoder import FastDecoder, FastExperts
from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.generate.rows import Row, Rows, generate
from minimind_v.core.generate.sampling import GREEDY, Sampler, Sampling
from minimind_v.core.generate.slots import MOST_ROWS, SPAN, Numbers, Slots
from tests.generate.made import KINDS, make_model
from tests.generate.test_engine import answer_all, new_engine, request_of, text_of

SAME = {"atol": 2e-5, "rtol": 0}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}


@pytest.fixture(params=KINDS.values(), ids=KINDS, scope="module")
def model(request):
    return make_model(seed=5, **request.param)


class Tape(TorchDispatchMode):
    """Notes torch's operators, and repeats them on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the GPU: it cannot be recorded"
        result = func(*args, **(kwargs or {}))
        assert not any(leaf.is_complex() for leaf in pytree.tree_leaves(result)), "rotations are of real numbers"
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

    def __call__(self, work, device, pool):
        tape = Tape()
        with tape:
            work()
        self.recorded += 1

        def replay():
            self.replayed += 1
            tape.replay()

        return replay


def on_a_gpu(decoder, record):
    """A decoder that does what it does on a GPU; `record` makes its recordings."""
    decoder.uses_slots = True
    slots = decoder.take_slots()
    slots.graphs.record = record
    decoder.give_back(slots)
    for layer in decoder.layers:
        if isinstance(layer.mlp, FastExperts):
            layer.mlp.reads_choice = False
    return decoder


class Pair:
    """Rows in slots, and the same rows by themselves; each token is drawn at random."""

    def __init__(self, model, prompts=()):
        self.recorder, self.plain = Recorder(), FastDecoder(model, torch.float32)
        self.decoder = on_a_gpu(FastDecoder(model, torch.float32), self.recorder)
        self.model, self.slots, self.caches = model, self.decoder.take_slots(), []
        for length in prompts:
            self.enter(length)

    def enter(self, length, most=2 * SPAN):
        cache, own = self.decoder.new_cache(1, length), self.plain.new_cache(1, most)
        x = self.model.embed(torch.randint(6, self.model.config.vocab_size, (1, length)))
        self.decoder.read(x, cache)
        self.plain.read(x, own)
        self.slots.enter(own, cache, [], most)
        self.caches.append(own)

    def leave(self, number):
        self.slots.leave(self.caches.pop(number))

    def step(self):
        """Both decode the same tokens → the logits [B, V] in slots."""
        order = self.slots.rows
        ids = torch.randint(6, self.model.config.vocab_size, (len(order),))
        numbers = [Numbers(int(token), cache.used) for token, cache in zip(ids, order, strict=True)]
        tokens = self.slots.step(self.decoder.decode, numbers)
        expected = self.plain.step(self.model.embed(ids[:, None]), order)
        torch.testing.assert_close(self.slots.logits[: len(order)], expected, **SAME)
        assert tokens == expected.argmax(dim=-1).tolist()
        return expected


@torch.inference_mode()
def test_a_row_grows_beyond_the_columns_of_its_step(model):
    pair = Pair(model, [SPAN - EAGER - 5])
    kept = None
    for step in range(2 * EAGER + 8):
        logits = pair.step()
        assert kept is None or not torch.equal(kept, logits), "the tokens make no difference"
        kept = logits
        assert pair.recorder.recorded == (step >= EAGER - 1) + (step >= 2 * EAGER + 4)
    assert pair.recorder.replayed == 5 + 3


@torch.inference_mode()
def test_rows_of_different_lengths_join_and_leave(model):
    pair = Pair(model, [20, 3, 11])
    for change in (lambda: None, lambda: pair.leave(0), lambda: pair.enter(40), lambda: pair.leave(2)):
        change()
        for _ in range(EAGER + 3):
            pair.step()
    assert pair.slots.room == (4, 2 * SPAN)
    assert pair.recorder.recorded == 2, "of 4 and of 2 slots"
    assert pair.recorder.replayed == 3 + 3 + EAGER + 3 + EAGER + 3, "the third and the fourth company need no other"


@torch.inference_mode()
def test_the_next_conversation_uses_what_was_recorded(model):
    pair = Pair(model, [9])
    for _ in range(EAGER + 3):
        pair.step()
    pair.leave(0)
    pair.decoder.give_back(pair.slots)
    assert pair.decoder.take_slots() is pair.slots
    pair.enter(30)
    for _ in range(3):
        pair.step()
    assert (pair.recorder.recorded, pair.recorder.replayed) == (1, 6)


@torch.inference_mode()
def test_slots_and_columns_grow_with_what_the_rows_hold(model):
    pair = Pair(model, [5])
    for _ in range(EAGER + 2):
        pair.step()
    pair.enter(7, most=3 * SPAN)
    pair.enter(2)
    assert pair.slots.room == (4, 4 * SPAN)
    for _ in range(EAGER + 2):
        pair.step()
    assert pair.recorder.recorded == 2, "other tensors need another recording"


@torch.inference_mode()
def test_what_is_no_number_goes_with_its_row(model):
    pair = Pair(model, [5, 9])
    pair.slots.cache.keys[:, 1] = pair.slots.cache.values[:, 1] = torch.nan
    pair.leave(1)
    pair.enter(4)
    pair.step()


def test_a_decoder_goes_at_once_when_nobody_has_it(model):
    """A GPU that is full waits for no garbage collector."""
    gc.disable()
    try:
        pair = Pair(model, [5])
        with torch.inference_mode():
            for _ in range(EAGER):
                pair.step()
        pair.leave(0)
        pair.decoder.give_back(pair.slots)
        gone = weakref.ref(pair.decoder), weakref.ref(pair.slots)
        del pair
        assert [reference() for reference in gone] == [None] * 2
    finally:
        gc.enable()


# --- through rows and the engine --------------------------------------------------------------------------------------


def engine_on_a_gpu(model, record=lambda work, device, pool: work, **settings):
    engine = new_engine(model, **settings)
    on_a_gpu(ready(model).decoder, record)
    return engine


SAMPLINGS = [
    GREEDY,
    Sampling(1.3, 0.95, seed=1),
    Sampling(0.9, 1.0, seed=2),
    Sampling(1.1, 0.9, seed=3, top_k=9),
    Sampling(1.5, 1.0, seed=4, min_p=0.05),
    Sampling(0.0, repetition_penalty=1.4),
    Sampling(1.2, 0.9, seed=5, repetition_penalty=0.7),
]


def test_every_request_gets_the_text_that_a_cpu_draws_alone_and_in_company(model):
    requests = [(number, SAMPLINGS[number % len(SAMPLINGS)]) for number in range(14)]

    def ask(engine):
        submitted = [request_of(engine, number, 12, sampling, logprobs=2) for number, sampling in requests]
        for request in submitted[1:]:  # one draws on the host
            object.__setattr__(request, "draw", request.draw.sampler)
        return answer_all(engine, submitted, 1)

    expected, drawn = ask(new_engine(model)), ask(engine_on_a_gpu(model))
    assert len({text_of(events) for events in expected}) > 8
    for events, others in zip(drawn, expected, strict=True):
        assert [event.token for event in events] == [event.token for event in others]
        for event, other in zip(events, others, strict=True):
            assert event.logprob == pytest.approx(other.logprob, abs=1e-4)
    engine = engine_on_a_gpu(model)
    for events, (number, sampling) in zip(expected, requests, strict=True):
        request = request_of(engine, number, 12, sampling)
        object.__setattr__(request, "draw", request.draw.sampler)
        assert text_of(engine.stream(request)) == text_of(events)


def test_sampled_steps_are_recorded_too(model):
    recorder = Recorder()
    engine, plain = engine_on_a_gpu(model, recorder), new_engine(model)
    sampling = Sampling(1.4, 0.9, seed=3, repetition_penalty=1.2)

    def text(engine):
        request = request_of(engine, 2, 2 * EAGER, sampling)
        object.__setattr__(request, "draw", request.draw.sampler)
        return text_of(engine.stream(request))

    on_a_gpu(ready(model).decoder, recorder)
    drawn = text(engine)
    assert (recorder.recorded, recorder.replayed > 3) == (1, True)
    ready(model).decoder.uses_slots = False
    assert drawn == text(plain)


def test_a_single_row_gives_its_slots_back():
    model = make_model(seed=5)
    recorder = Recorder()
    on_a_gpu(ready(model).decoder, recorder)
    texts = [list(generate(model, Row([7, 8, 9], Sampler(GREEDY), EAGER + 6), -1)) for _ in range(3)]
    assert recorder.recorded == 1
    assert texts[0] == texts[1] == texts[2]


def test_an_interrupted_step_is_done_again(monkeypatch):
    model = make_model(seed=5)

    def answer(interrupt):
        rows = Rows(model)
        row = Row([7, 8, 9], Sampler(Sampling(1.5, 1.0, seed=2)), 9)
        rows.add(row)
        while len(row.drawn) < 9:
            if interrupt and len(row.drawn) == 4:
                with monkeypatch.context() as patched:
                    patched.setattr("minimind_v.core.generate.rows._keep", interrupted)
                    with pytest.raises(KeyboardInterrupt):
                        list(rows.step())
            list(rows.step())
        rows.remove(row)
        return row.drawn

    def interrupted(*_):
        raise KeyboardInterrupt

    on_a_gpu(ready(model).decoder, lambda work, device, pool: work)
    assert answer(False) == answer(True)


def test_a_row_without_memory_ends_alone(monkeypatch):
    model = make_model(seed=5)
    engine, enter = engine_on_a_gpu(model), Slots.enter

    def full(self, row, cache, text_ids, most):
        if len(self.rows) == 2:
            raise RuntimeError("out of memory")
        enter(self, row, cache, text_ids, most)

    monkeypatch.setattr(Slots, "enter", full)
    answers = answer_all(engine, [request_of(engine, number, 9) for number in range(3)], 1)
    assert [events[-1].end for events in answers] == ["length", "length", "error"]


def test_a_step_that_fails_ends_its_rows_and_no_later_one(monkeypatch):
    model = make_model(seed=5)
    engine = engine_on_a_gpu(model)
    with monkeypatch.context() as patched:
        patched.setattr(Slots, "step", lambda *_: 1 / 0)
        answers = answer_all(engine, [request_of(engine, number, 9) for number in range(2)], 1)
    assert [events[-1].end for events in answers] == ["error"] * 2
    assert text_of(engine.stream(request_of(engine, 1, 9))) == text_of(
        new_engine(model).stream(request_of(engine, 1, 9))
    )


def test_most_rows_of_an_engine():
    model = make_model()
    assert Engine(model, new_engine(model).tokenizer).most_rows == 16
    assert MOST_ROWS == 64
