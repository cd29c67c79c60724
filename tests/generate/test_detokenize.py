"""From ids to text."""

import random

import pytest

from minimind_v.core.data.thinking import split_answer
from minimind_v.core.generate.detokenize import TextStream, split_stream
from tests.cli.harness import tokenizer


@pytest.mark.parametrize("seed", range(40))
def test_pieces_make_up_the_text_of_any_ids(seed):
    """Random ids are broken characters mostly; none is lost, and none shown before it is whole."""
    rng, loaded_tokenizer = random.Random(seed), tokenizer()
    ids = [rng.randrange(loaded_tokenizer.vocab_size) for _ in range(60)]
    if seed % 2:
        ids = loaded_tokenizer.encode("".join(rng.choices("aé星😀👍🏽 \n  ñ", k=30))).ids
    stream = TextStream(loaded_tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.rest() == loaded_tokenizer.decode(ids)
    if seed % 2:
        assert stream.rest() == ""
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_a_long_answer_costs_no_more_per_token():
    decoded = []

    class Counting:
        def decode(self, ids):
            decoded.append(len(ids))
            return tokenizer().decode(ids)

    stream = TextStream(Counting())
    for token in tokenizer().encode("A red star 和一个大圆。" * 50).ids:
        stream.add(token)
    assert max(decoded) <= 4


@pytest.mark.parametrize("text", ["a red star", "a red re", "rere red", "a star", "red", "一个红色的星形", ""])
@pytest.mark.parametrize("stop", [("red",), ("star", "red s"), ("rere", "re r"), ("色",), ("",) * 0])
def test_a_text_ends_before_the_first_stop_string(text, stop):
    stream, pieces = TextStream(tokenizer(), stop), []
    for token in tokenizer().encode(text).ids:
        pieces.append(stream.add(token))
        assert not any(mark in "".join(pieces) for mark in stop)
    ends = [text.index(mark) for mark in stop if mark in text]
    assert "".join(pieces) + stream.rest() == text[: min(ends, default=len(text))]
    assert stream.stopped == bool(ends)


REASONED = "Two cups,\n\none book.\n</think>\n\nA <b>book</b>.\n</thing>"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_reasoning_is_separated_wherever_the_pieces_begin(size):
    pieces = [REASONED[begin : begin + size] for begin in range(0, len(REASONED), size)]
    split = list(split_stream(pieces, think=True))
    reasoning, answer = ("".join(text for kind, text in split if kind is which) for which in (True, False))
    assert (reasoning, answer) == split_answer(REASONED)
    assert answer == "A <b>book</b>.\n</thing>"


@pytest.mark.parametrize(
    "text", ["", "why", "\nwhy\n", "why</thi", "why\n</think>", "</think>\n\nyes", "a</think>b</think>"]
)
def test_every_end_of_reasoning_is_split_as_the_whole_text_is(text):
    split = list(split_stream(text, think=True))
    assert ("".join(t for kind, t in split if kind), "".join(t for kind, t in split if not kind)) == split_answer(text)


def test_an_answer_without_reasoning_passes_unchanged():
    assert list(split_stream(["\n a", "</think>"], think=False)) == [(False, "\n a"), (False, "</think>")]
