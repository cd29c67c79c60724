"""Decoding with a cache gives what reading everything again gives."""

from __future__ import annotations

import pytest
import torch

CLOSE = {"atol": 2e-5, "rtol": 0}
KINDS = {"dense": {}, "experts": {"use_moe": True}}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request, make_vlm):
    return make_vlm(seed=3, **request.param)


@torch.inference_mode()
def test_one_token_at_a_time(model):
    input_ids = torch.randint(0, 61, (2, 40))
    everything = model(input_ids).logits  # [B, T, V]
    cache = model.new_cache(2, 40)
    chunks = [model(input_ids[:, :7], cache=cache).logits]
    chunks += [model(input_ids[:, at : at + 1], cache=cache).logits for at in range(7, 40)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), everything, **CLOSE)


@torch.inference_mode()
def test_many_tokens_behind_others(model):
    """A further question: several tokens at once on a cache that is not empty."""
    input_ids = torch.randint(0, 61, (2, 30))
    cache = model.new_cache(2, 64)
    chunks = [model(chunk, cache=cache).logits for chunk in input_ids.split((4, 1, 13, 12), dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(input_ids).logits, **CLOSE)


@torch.inference_mode()
def test_rows_of_different_lengths(model):
    """A right-padded batch, continued token by token, then by chunks that are padded themselves."""
    rows = [torch.randint(0, 61, (length,)) for length in (29, 33, 21)]
    prompts, chunks = (11, 3, 7), (4, 9, 1)  # tokens of each row that are read first, and at the end
    singles = 6
    cache = model.new_cache(3, 64)

    def read(starts, counts):
        """Read the next `counts` tokens of the rows, and compare with each row read alone and whole."""
        longest = max(counts)
        ids = torch.randint(0, 61, (3, longest))  # padding may be anything
        mask = torch.zeros(3, longest, dtype=torch.bool)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            ids[row, :count] = rows[row][start : start + count]
            mask[row, :count] = True
        logits = model(ids, attention_mask=mask, cache=cache).logits
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            alone = model(rows[row][None, : start + count], logits_to_keep=count).logits[0]
            torch.testing.assert_close(logits[row, :count], alone, **CLOSE)
        return [start + count for start, count in zip(starts, counts, strict=True)]

    starts = read((0, 0, 0), prompts)
    for _ in range(singles):
        starts = read(starts, (1, 1, 1))
    starts = read(starts, chunks)
    starts = read(starts, (1, 1, 1))
    assert cache.lengths.tolist() == starts == [22, 19, 15]


@torch.inference_mode()
def test_rewound_cache_forgets(model):
    input_ids, other = torch.randint(0, 61, (1, 20)), torch.randint(0, 61, (1, 5))
    cache = model.new_cache(1, 32)
    model(input_ids, cache=cache)
    cache.rewind(12)
    logits = model(other, cache=cache).logits
    whole = model(torch.cat((input_ids[:, :12], other), dim=1), logits_to_keep=5).logits
    torch.testing.assert_close(logits, whole, **CLOSE)
    cache.rewind(0)
    torch.testing.assert_close(model(other, cache=cache).logits, model(other).logits, **CLOSE)


@torch.inference_mode()
def test_rows_that_share_a_beginning_go_on_by_themselves(model):
    """A row may stand for several, and of a chunk each keeps its own first tokens."""
    beginnings, later = torch.randint(0, 61, (2, 9)), torch.randint(0, 61, (3, 6))
    cache = model.new_cache(2, 9)
    model(beginnings, cache=cache)
    cache.hide((9, 5), 9)
    cache = cache.select(torch.tensor([1, 0, 1]), 30)
    model(later, cache=cache)
    cache.hide((2, 6, 4), 6)
    lasts = torch.randint(0, 61, (3, 2))
    logits = model(lasts, cache=cache).logits
    for row, (first, of_first, of_later) in enumerate(((1, 5, 2), (0, 9, 6), (1, 5, 4))):
        whole = torch.cat((beginnings[first, :of_first], later[row, :of_later], lasts[row]))[None]
        torch.testing.assert_close(logits[row], model(whole, logits_to_keep=2).logits[0], **CLOSE)


@torch.inference_mode()
def test_images_of_an_earlier_chunk_stay_in_the_cache(model):
    """Features are given with the first chunk only."""
    features = torch.randn(1, 4, 24)
    input_ids = torch.cat((torch.tensor([[7, 8, 5, 5, 5, 5]]), torch.randint(6, 61, (1, 9))), dim=1)
    cache = model.new_cache(1, 32)
    model(input_ids[:, :8], image_features=features, cache=cache)
    later = model(input_ids[:, 8:], cache=cache).logits
    whole = model(input_ids, image_features=features, logits_to_keep=7).logits
    torch.testing.assert_close(later, whole, **CLOSE)
    assert (later - model(input_ids, logits_to_keep=7).logits).abs().max() > 0.01, "the picture makes no difference"


@torch.inference_mode()
def test_full_cache_is_an_error_not_a_wrong_answer(model):
    cache = model.new_cache(1, 8)
    model(torch.randint(0, 61, (1, 6)), cache=cache)
    with pytest.raises(ValueError, match="holds 8 tokens, but 9 are needed"):
        model(torch.randint(0, 61, (1, 3)), cache=cache)
