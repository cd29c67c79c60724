"""The engine: requests that join and leave at any time, each answered as if it were alone."""

import threading

import pytest
import torch

from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import RowError, UsageError
from minimind_v.core.generate import prompt_cache
from minimind_v.core.generate.engine import Engine, Request
from minimind_v.core.generate.fast_decoder import FastDecoder
from minimind_v.core.generate.prompt_cache import BLOCK, ready
from minimind_v.core.generate.sampling import GREEDY, Sampler, Sampling
from tests.cli.harness import tokenizer
from tests.generate.made import KINDS, make_model
from tests.generate.test_prompt_cache import picture
from tests.tokenizers_made import thinking_tokenizer

TEXT = "What colour is the star? 有几个物体？ Is the small circle left of the big one, or right of it? "


class Noting:
    """A sampler that keeps the logits of every draw; `fail_at`: the draw that raises."""

    def __init__(self, sampling, fail_at=None):
        self.sampler, self.fail_at, self.logits = Sampler(sampling), fail_at, []

    def __call__(self, logits, text_ids):
        self.logits.append(logits.clone())
        if len(self.logits) - 1 == self.fail_at:
            raise RuntimeError("no draw")
        return self.sampler(logits, text_ids)


def prompt_of(engine, number):
    """Prompts of all lengths and of up to two images, of which some begin alike."""
    images = [picture(number % 3 + index) for index in range(number % 3)]
    text = "<image>" * len(images) + TEXT * (number % 4) + TEXT[number % 9 :]
    return engine.prompt([{"role": "user", "content": text}], images)


def request_of(engine, number, limit=12, sampling=None, **settings):
    draw = Noting(sampling or Sampling(1.3, 0.95, seed=number))
    return Request(prompt_of(engine, number), draw, limit, **settings)


def new_engine(model, **settings):
    """An engine of a model that has kept nothing."""
    prompt_cache._READY.clear()
    return Engine(model, tokenizer(), **settings)


def answer_all(engine, requests, joining=3):
    """The events of each request; one more joins after so many steps."""
    events = [[] for _ in requests]
    for request, own in zip(requests, events, strict=True):
        engine.submit(request, own.append)
        for _ in range(joining):
            engine.step()
    while engine.step():
        pass
    return events


def text_of(events):
    return "".join(event.text for event in events)


def in_half_precision(model):
    """Weights as published: FBGEMM multiplies them, and oneDNN all others."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


# --- company ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("half", [False, True], ids=["any weights", "half-precision weights"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_request_gets_the_same_bits_alone_and_in_any_company(kind, half):
    model = make_model(seed=4, **kind)
    model = in_half_precision(model) if half else model
    alone = []
    for number in range(14):
        engine = new_engine(model)
        request = request_of(engine, number)
        alone.append((text_of(engine.stream(request)), request.draw.logits))
    assert len({text for text, _ in alone}) > 10
    for most_rows, joining in ((16, 0), (3, 1), (7, 2)):
        engine = new_engine(model, most_rows=most_rows)
        requests = [request_of(engine, number) for number in range(14)]
        events = answer_all(engine, requests, joining)
        for (text, logits), request, own in zip(alone, requests, events, strict=True):
            assert text_of(own) == text
            assert all(torch.equal(*pair) for pair in zip(request.draw.logits, logits, strict=True))


def test_what_earlier_requests_left_changes_no_bit():
    model = make_model(seed=4)
    engine = new_engine(model)
    first, again, fresh = (request_of(engine, 11) for _ in range(3))
    list(engine.stream(first))
    list(engine.stream(again))
    list(new_engine(model).stream(fresh))
    for request in (again, fresh):
        assert all(torch.equal(*pair) for pair in zip(request.draw.logits, first.draw.logits, strict=True))


def test_many_seeds_draw_the_same_alone_and_in_company():
    model, count = in_half_precision(make_model(seed=6)), 64
    engine = new_engine(model)
    requests = [request_of(engine, 4, sampling=Sampling(1.5, 1.0, seed=seed)) for seed in range(count)]
    together = [text_of(events) for events in answer_all(engine, requests, 0)]
    alone = [
        text_of(engine.stream(request_of(engine, 4, sampling=Sampling(1.5, 1.0, seed=seed)))) for seed in range(count)
    ]
    assert together == alone
    assert len(set(alone)) > count // 2


def test_a_step_reads_one_piece_and_encodes_one_image_at_most(monkeypatch):
    model = make_model(seed=4)
    engine, pieces, images = new_engine(model), [], []
    read, encode = FastDecoder.read, model.vision_encoder.forward
    monkeypatch.setattr(FastDecoder, "read", lambda self, x, cache: pieces.append(x.shape[1]) or read(self, x, cache))
    monkeypatch.setattr(model.vision_encoder, "forward", lambda pixels: images.append(len(pixels)) or encode(pixels))
    running = []
    engine.submit(request_of(engine, 0, 200), running.append)
    while not running:
        engine.step()
    pieces.clear()
    for number in (5, 8, 11):
        engine.submit(request_of(engine, number), lambda event: None)
    for _ in range(12):
        before = len(running), len(images), len(pieces)
        engine.step()
        assert len(running) == before[0] + 1, "the one that runs gets its token at each step"
        assert len(images) - before[1] <= 1
        assert len(pieces) - before[2] <= 1
    assert max(pieces) == BLOCK
    assert len(images) == 2


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_request_is_cancelled_at_any_token_and_the_others_do_not_notice(at):
    model = make_model(seed=4)
    expected = text_of(new_engine(model).stream(request_of(new_engine(model), 3)))
    engine, cancelled, other = new_engine(model), [], []
    answer = engine.submit(request_of(engine, 1, 100), cancelled.append)
    engine.submit(request_of(engine, 3), other.append)
    while len(cancelled) < at:
        engine.step()
    answer.cancel()
    while engine.step():
        pass
    assert [event.token is None for event in cancelled] == [False] * at + [True]
    assert cancelled[-1].end == "cancelled"
    assert text_of(other) == expected
    answer.cancel()
    assert not engine.step(), "nothing is left of it"
    assert cancelled[-1].end == "cancelled"


def test_a_waiting_request_is_cancelled_too():
    engine = new_engine(make_model(seed=4), most_rows=1)
    events = [], []
    engine.submit(request_of(engine, 0, 30), events[0].append)
    engine.submit(request_of(engine, 1), events[1].append).cancel()
    engine.step()
    assert [event.end for event in events[1]] == ["cancelled"]


def test_a_stream_that_is_closed_leaves_at_once():
    engine = new_engine(make_model(seed=4))
    stream = engine.stream(request_of(engine, 0, 100))
    next(stream)
    stream.close()
    assert not engine.step()


def test_answers_end_at_the_limit_at_the_end_token_and_at_the_context():
    model = make_model(seed=4)
    engine = new_engine(model)
    [*tokens, last] = engine.stream(request_of(engine, 2, 7))
    assert (len(tokens), last.end, last.token) == (7, "length", None)
    script = [40, 41, tokenizer().eos_id]
    [*tokens, last] = engine.stream(Request(prompt_of(engine, 2), lambda *_: script.pop(0)))
    assert ([event.token for event in tokens], last.end) == ([40, 41], "stop")
    engine = new_engine(model, context=60)
    prompt = engine.prompt([{"role": "user", "content": "Is it?"}])
    [*tokens, last] = engine.stream(Request(prompt, lambda *_: 40, 500))
    assert (len(tokens), last.end) == (60 - len(prompt.tokens), "length")


def test_errors_end_their_own_request_only(monkeypatch):
    model = make_model(seed=4)
    expected = text_of(new_engine(model).stream(request_of(new_engine(model), 3)))
    engine = new_engine(model)
    bad_rows, step = [], FastDecoder.step

    def failing_step(self, x, caches, in_company):
        if any(answer.row.cache in caches for answer in bad_rows if len(answer.row.drawn) > 4):
            raise RuntimeError("no memory")
        return step(self, x, caches, in_company)

    def broken_receiver(event):
        raise OSError("gone")

    monkeypatch.setattr(FastDecoder, "step", failing_step)
    good, drawing, forward, image = [], [], [], []
    bad_rows.append(engine.submit(request_of(engine, 1), forward.append))
    engine.submit(Request(prompt_of(engine, 2), Noting(GREEDY, fail_at=2)), drawing.append)
    engine.submit(request_of(engine, 3), good.append)
    engine.submit(request_of(engine, 4), broken_receiver)
    encode, broken = model.vision_encoder.forward, picture(99)

    def encode_others(pixels):
        if pixels.numpy().sum() == broken.sum():
            raise ZeroDivisionError
        return encode(pixels)

    monkeypatch.setattr(model.vision_encoder, "forward", encode_others)
    prompt = engine.prompt([{"role": "user", "content": "<image>"}], [broken])
    engine.submit(Request(prompt, Sampler(GREEDY)), image.append)
    while engine.step():
        pass
    assert text_of(good) == expected
    assert [len(events) for events in (forward, drawing, image)] == [6, 3, 1]
    assert [type(events[-1].error) for events in (forward, drawing, image)] == [
        RuntimeError,
        RuntimeError,
        ZeroDivisionError,
    ]
    assert {events[-1].end for events in (forward, drawing, image)} == {"error"}
    with pytest.raises(RuntimeError, match="no draw"):
        list(engine.stream(Request(prompt_of(engine, 2), Noting(GREEDY, fail_at=0))))


def test_a_stop_string_ends_the_text_before_it():
    engine = new_engine(make_model(seed=4))
    script = tokenizer().encode("A red star, and a blue star.").ids
    for stop, text in (("star", "A red "), (", and", "A red star"), ("nothing", "A red star, and a blue star.")):
        ids = iter([*script, tokenizer().eos_id])
        [*tokens, last] = engine.stream(Request(prompt_of(engine, 0), lambda *_, ids=ids: next(ids), stop=("#", stop)))
        assert text_of([*tokens, last]) == text
        assert last.end == "stop"
        assert not any(stop in event.text for event in tokens)


# --- what a request is told -------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_log_probabilities_are_those_of_the_model():
    model = make_model(seed=4)
    engine = new_engine(model)
    prompt = prompt_of(engine, 0)
    [*events, _] = engine.stream(Request(prompt, Sampler(Sampling(1.2, 0.9, seed=3)), 6, logprobs=5))
    ids = [event.token for event in events]
    expected = model(torch.tensor([prompt.tokens.input_ids + ids])).logits[0, len(prompt.tokens) - 1 : -1]
    for event, logprobs in zip(events, expected.log_softmax(dim=-1), strict=True):
        assert event.logprob == pytest.approx(float(logprobs[event.token]), abs=1e-4)
        values, tokens = logprobs.topk(5)
        assert [token for token, _ in event.likeliest] == tokens.tolist()
        assert [value for _, value in event.likeliest] == pytest.approx(values.tolist(), abs=1e-4)
    [event, *_] = engine.stream(Request(prompt, Sampler(GREEDY), 1, logprobs=0))
    assert event.logprob is not None
    assert event.likeliest == ()
    [event, *_] = engine.stream(Request(prompt, Sampler(GREEDY), 1))
    assert event.logprob is None


def conversation(turns):
    """Questions of which each has an image, all but the last with an answer."""
    messages = []
    for number in range(turns):
        messages += [
            {"role": "user", "content": f"<image>Is number {number} big?"},
            {"role": "assistant", "content": "It is not."},
        ]
    return messages[:-1]


def test_a_conversation_that_is_too_long_loses_its_earliest_turns_and_their_images():
    engine = new_engine(make_model(seed=4), context=120)
    images = [picture(number) for number in range(6)]
    system = {"role": "system", "content": "Be short."}
    prompt = engine.prompt([system, *conversation(6)], images, max_new_tokens=20)
    kept = 6 - prompt.dropped_turns
    assert 0 < kept < 6
    rest = conversation(6)[2 * prompt.dropped_turns :]
    assert prompt.tokens == engine.processor.prompts.prompt([system, *rest])
    assert [image.sum() for image in prompt.images] == [image.sum() for image in images[-kept:]]
    assert len(prompt.tokens) + 20 <= 120
    assert not engine.prompt([system, *conversation(1)], images[:1]).dropped_turns
    with pytest.raises(UsageError, match="the question is longer than 120 tokens — shorten it"):
        engine.prompt([{"role": "user", "content": TEXT * 9}])
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1, not 0"):
        engine.prompt(conversation(1), images[:1], max_new_tokens=0)


def test_a_prompt_is_that_of_the_layout_with_and_without_thinking(tmp_path):
    thinking = Engine(make_model(), Tokenizer.load(thinking_tokenizer(tmp_path)))
    for engine, think in ((thinking, True), (thinking, False), (new_engine(make_model()), False)):
        messages = [*conversation(2), {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And?"}]
        prompt = engine.prompt(messages, [picture(0), picture(1)], think=think)
        assert prompt.tokens == engine.processor.prompts.prompt(messages, think)


def test_messages_and_images_that_do_not_belong_together_are_reported():
    engine = new_engine(make_model())
    with pytest.raises(UsageError, match="the messages have 2 <image> marks for 1 image"):
        engine.prompt(conversation(2), [picture(0)])
    with pytest.raises(RowError, match="do not alternate"):
        engine.prompt([{"role": "assistant", "content": "Yes."}])


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_submit_and_cancel_while_another_steps():
    model = make_model(seed=4)
    alone = {number: text_of(new_engine(model).stream(request_of(new_engine(model), number))) for number in range(12)}
    engine, stop, texts = new_engine(model, most_rows=4), threading.Event(), {}
    stepping = threading.Thread(target=engine.run, args=(stop,))
    stepping.start()

    def ask(number):
        events, ended = [], threading.Event()

        def deliver(event):
            events.append(event)
            if event.end:
                ended.set()

        if number % 3 == 0:
            engine.submit(request_of(engine, number, 200), lambda event: None).cancel()
        engine.submit(request_of(engine, number), deliver)
        assert ended.wait(60)
        texts[number] = text_of(events)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    stepping.join(10)
    assert not stepping.is_alive()
    assert texts == alone


def test_streams_of_several_threads_drive_each_other():
    model = make_model(seed=4)
    alone = {number: text_of(new_engine(model).stream(request_of(new_engine(model), number))) for number in range(6)}
    engine, texts = new_engine(model), {}
    threads = [
        threading.Thread(target=lambda n=number: texts.update({n: text_of(engine.stream(request_of(engine, n)))}))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == alone
    assert ready(model).prefixes.size > 0
