"""From ids to text."""

import random

import pytest

from minimind_v.core.generate.detokenize import TextStream
from tests.cli.harness import tokenizer


@pytest.mark.parametrize("seed", range(40))
def test_pieces_make_up_the_text_of_any_ids(seed):
    """Random ids are broken characters mostly; none is lost, and none shown before it is whole."""
    rng, words = random.Random(seed), tokenizer()
    ids = [rng.randrange(words.vocab_size) for _ in range(60)]
    if seed % 2:
        ids = words.encode("".join(rng.choices("aé星😀👍🏽 \n  ñ", k=30))).ids
    stream = TextStream(words)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.rest() == words.decode(ids)
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
