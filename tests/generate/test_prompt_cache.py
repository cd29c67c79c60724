"""What is kept between questions saves work and changes no answer."""

import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from minimind_v.core.errors import UsageError
from minimind_v.core.generate import prompt_cache as kept
from minimind_v.core.generate.fast_decoder import FastDecoder
from minimind_v.core.generate.prompt_cache import BLOCK, ready
from minimind_v.core.generate.sampling import GREEDY
from minimind_v.core.generate.session import Session
from tests.cli.harness import tokenizer
from tests.generate.made import KINDS, make_model

SIZE = 16
FIRST, SECOND = "What colour is the star?", "Is the circle big?"


def picture(number):
    return np.random.default_rng(number).integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8)


@pytest.fixture(params=(KINDS["dense"], KINDS["experts"]), ids=("dense", "experts"))
def model(request):
    return make_model(seed=5, **request.param)


@pytest.fixture
def counted(model, monkeypatch):
    """How many pictures are looked at, and how many tokens are read, from now on."""
    counts = {"pictures": 0, "tokens": 0}
    encode, read, step = model.vision_encoder.forward, FastDecoder.read, FastDecoder.step

    def encode_and_count(pixel_values):
        counts["pictures"] += len(pixel_values)
        return encode(pixel_values)

    def count_tokens(method):
        def counting(self, x, *args):
            counts["tokens"] += x.shape[1]
            return method(self, x, *args)

        return counting

    monkeypatch.setattr(model.vision_encoder, "forward", encode_and_count)
    monkeypatch.setattr(FastDecoder, "read", count_tokens(read))
    monkeypatch.setattr(FastDecoder, "step", count_tokens(step))
    return counts


def ask(session, question, pictures):
    return "".join(session.ask(question, pictures, 6))


def fresh(model, question, pictures):
    """The answer of a model that remembers nothing."""
    kept._READY.clear()
    return ask(Session(model, tokenizer(), GREEDY), question, pictures)


def test_a_new_conversation_about_the_same_picture_reads_only_what_follows_the_kept_blocks(model, counted):
    about = "The pictures show stars and circles, large ones and small ones, red ones and blue ones. " * 4
    shown = [picture(1), picture(2)]
    expected = fresh(model, about + SECOND, shown)
    fresh(model, about + FIRST, shown)
    for again in (Session(model, tokenizer(), GREEDY), Session(model, tokenizer(), GREEDY)):
        counted.update(pictures=0, tokens=0)
        assert ask(again, about + SECOND, [picture(1), picture(2)]) == expected
        assert counted["pictures"] == 0
        assert len(again.turns[1]) > 2 * BLOCK > counted["tokens"]
        again.restart()
        assert ask(again, about + SECOND, shown) == expected


def test_a_further_question_reads_only_what_follows_the_kept_blocks(model, counted):
    about = "The pictures show stars and circles, large ones and small ones, red ones and blue ones. " * 4
    session = Session(model, tokenizer(), GREEDY)
    ask(session, about + FIRST, [picture(1)])
    counted.update(pictures=0, tokens=0)
    ask(session, SECOND, [])
    assert counted["pictures"] == 0
    assert counted["tokens"] < 2 * BLOCK < sum(map(len, session.turns))


def test_a_picture_that_was_encoded_before_the_question_is_not_encoded_again(model, counted, tmp_path):
    path = tmp_path / "dog.png"
    Image.fromarray(picture(1).transpose(1, 2, 0)).save(path)
    expected = fresh(model, FIRST, [path])
    kept._READY.clear()
    session = Session(model, tokenizer(), GREEDY)
    counted.update(pictures=0)
    shown = session.encode(path)
    assert np.array_equal(shown, picture(1))
    assert counted["pictures"] == 1
    assert ask(session, FIRST, [shown]) == expected
    assert counted["pictures"] == 1


def test_other_pictures_and_another_order_are_not_mistaken(model):
    cases = [[1], [2], [1, 2], [2, 1], [1, 1], [1, 2, 1], []]
    expected = [fresh(model, FIRST, [picture(number) for number in case]) for case in cases]
    assert len(set(expected)) > 3, "the pictures make no difference"
    kept._READY.clear()
    for _ in range(2):
        for case, answer in zip(cases, expected, strict=True):
            assert ask(Session(model, tokenizer(), GREEDY), FIRST, [picture(number) for number in case]) == answer


def test_of_several_pictures_only_new_ones_are_encoded(model, counted):
    session = Session(model, tokenizer(), GREEDY)
    ask(session, FIRST, [picture(1)])
    ask(session, FIRST, [picture(2), picture(1)])  # a later question of the conversation
    session.restart()
    ask(session, "Is <image> like <image>?", [picture(2), picture(3)])
    assert counted["pictures"] == 3


def test_weights_that_change_are_noticed(model):
    session = Session(model, tokenizer(), GREEDY)
    before = ask(session, FIRST, [picture(1)])
    assert ready(model) is ready(model)
    optimiser = torch.optim.AdamW([*model.model.parameters(), *model.vision_proj.parameters()], lr=0.5)
    model(torch.randint(6, 60, (1, 8))).logits.square().mean().backward()
    optimiser.step()
    session.restart()
    after = ask(session, FIRST, [picture(1)])
    assert after == fresh(model, FIRST, [picture(1)])
    assert after != before
    held = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(held)
    session.restart()
    assert ask(session, FIRST, [picture(1)]) == fresh(model, FIRST, [picture(1)])


def test_no_more_bytes_are_kept_than_allowed(model, counted):
    memory, session = ready(model), Session(model, tokenizer(), GREEDY)
    ask(session, FIRST * 20, [picture(0)])
    image, blocks = memory.images.size, len(memory.prefixes)
    memory.images.limit, memory.prefixes.limit = 3 * image, memory.prefixes.size
    for number in range(1, 6):
        session.restart()
        ask(session, FIRST * 20, [picture(number)])
    assert (memory.images.size, len(memory.images)) == (3 * image, 3)
    assert len(memory.prefixes) == blocks
    assert memory.prefixes.size <= memory.prefixes.limit
    counted.update(pictures=0)
    session.restart()
    ask(session, FIRST, [picture(number) for number in range(6)])  # more than are kept
    assert counted["pictures"] == 6, "the least recently used are dropped, so each is gone before its turn"
    memory.images.limit = memory.prefixes.limit = 0
    session.restart()
    assert ask(session, FIRST, [picture(1), picture(2)]) == fresh(model, FIRST, [picture(1), picture(2)])


def test_what_two_threads_add_counts_once():
    store = kept.Store(100)
    for _ in range(2):
        store.add(b"image", torch.zeros(10, dtype=torch.uint8))
    assert (len(store), store.size) == (1, 10)


def test_a_model_that_is_gone_is_not_kept(model):
    other = make_model(seed=1)
    ask(Session(other, tokenizer(), GREEDY), FIRST, [picture(1)])
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    assert all(entry is not None for entry in kept._READY)


def test_without_its_vision_model_a_model_says_so(model):
    model.vision_encoder = None
    with pytest.raises(UsageError, match="without its vision encoder"):
        ask(Session(model, tokenizer(), GREEDY), FIRST, [picture(1)])


def test_bf16_is_near(model):
    """What a GPU computes in, here on the CPU."""
    near, exact = FastDecoder(model, torch.bfloat16), ready(model).decoder
    ids = torch.randint(6, 600, (1, 20))
    with torch.inference_mode():
        caches = near.new_cache(1, 30), exact.new_cache(1, 30)
        for chunk in (ids, ids[:, :1]):
            a, b = (
                decoder.read(model.embed(chunk), cache) for decoder, cache in zip((near, exact), caches, strict=True)
            )
    assert caches[0].keys.dtype == torch.bfloat16
    assert a.dtype == torch.float32
    assert (a - b).abs().max() < 0.1 * b.std() + 0.1
    assert torch.corrcoef(torch.stack((a[0], b[0])))[0, 1] > 0.98
