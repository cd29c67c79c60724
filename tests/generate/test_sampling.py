"""Drawing the next token."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minimind_v.core.errors import UsageError
from minimind_v.core.generate.sampling import GREEDY, Sampler, Sampling, draw_tokens

PROBS = torch.tensor([0.15, 0.4, 0.05, 0.3, 0.1])


def shares(sampling, logits=None, draws=4000):
    """How often each token is drawn."""
    sampler = Sampler(sampling)
    logits = PROBS.log() if logits is None else logits
    drawn = torch.tensor([sampler(logits) for _ in range(draws)])
    return drawn.bincount(minlength=len(logits)) / draws


def test_at_temperature_one_tokens_come_as_likely_as_they_are():
    assert shares(Sampling(1.0, 1.0, seed=0)).tolist() == pytest.approx(PROBS.tolist(), abs=0.03)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature):
    expected = PROBS ** (1 / temperature)
    expected = (expected / expected.sum()).tolist()
    assert shares(Sampling(temperature, 1.0, seed=0)).tolist() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [0, 1, 3]),
        (0.94, [0, 1, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_the_nucleus_is_the_fewest_tokens_that_hold_the_mass(top_p, kept):
    frequencies = shares(Sampling(1.0, top_p, seed=1))
    assert frequencies.nonzero().flatten().tolist() == kept
    expected = PROBS[kept] / PROBS[kept].sum()
    assert frequencies[kept].tolist() == pytest.approx(expected.tolist(), abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-320, 1e-6])
def test_the_coldest_draw_is_the_likeliest(temperature):
    logits = torch.tensor([1.0, 300.0, -300.0, 299.0])
    assert shares(Sampling(temperature, 1.0, seed=0), logits, 50).tolist() == [0, 1, 0, 0]


def test_the_hottest_draw_heeds_nothing():
    assert shares(Sampling(float("inf"), 1.0, seed=0)).tolist() == pytest.approx([0.2] * 5, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_precision_of_logits_will_do(dtype):
    assert shares(Sampling(1.0, 1.0, seed=0), PROBS.log().to(dtype)).tolist() == pytest.approx(PROBS.tolist(), abs=0.03)


def test_a_seed_decides_the_draws_whatever_else_is_drawn():
    def draws(seed):
        sampler = Sampler(Sampling(1.0, 1.0, seed))
        torch.manual_seed(torch.initial_seed() + 1)
        return [sampler(PROBS.log()) for _ in range(30)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_greedy_is_deterministic():
    assert {Sampler(GREEDY)(PROBS.log()) for _ in range(5)} == {1}


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            {"temperature": -0.1},
            {"temperature": float("nan")},
            {"top_p": 0.0},
            {"top_p": 1.01},
            {"top_p": float("nan")},
        ),
        *({"seed": -1}, {"seed": 2**63}),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match=f"^{next(iter(wrong))} must"):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"min_p": 1.1}, "min_p must be at least 0 and at most 1"),
        ({"min_p": float("nan")}, "min_p must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be above 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 200, "top_p": 0.9},
        {"top_k": 12, "top_p": 0.5},
        {"min_p": 0.1},
        {"min_p": 0.001},
        {"min_p": 0.05, "top_p": 0.8, "top_k": 30},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "top_k": 5, "min_p": 0.02, "top_p": 0.99},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_limits_are_those_of_transformers(limits, temperature):
    """The same random numbers, over the probabilities that the processors of transformers leave."""
    settings = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0} | limits
    steps = [RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])]
    steps += [TemperatureLogitsWarper(temperature)] if temperature else []
    steps += [TopKLogitsWarper(settings["top_k"])] if settings["top_k"] else []
    steps += [TopPLogitsWarper(settings["top_p"]), MinPLogitsWarper(settings["min_p"])]
    processors = LogitsProcessorList(steps if temperature else steps[:1])
    for number in range(60):
        source = torch.Generator().manual_seed(number)
        logits = torch.randn(300, generator=source).double() * (1 + number % 4)
        text_ids = torch.randint(0, 300, (20,), generator=source)
        probs = processors(text_ids[None], logits[None].clone())[0].softmax(dim=-1)
        sampler = Sampler(Sampling(temperature, seed=number, **settings))
        drawn = sampler(logits, text_ids.tolist())
        ordered, ids = probs.sort(descending=True, stable=True)
        point = torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        in_order = int(ids[int((ordered.cumsum(dim=-1) <= point).sum())])
        by_id = int((probs.cumsum(dim=-1) <= point).sum())
        unlimited = not (settings["top_k"] or settings["min_p"]) and settings["top_p"] == 1
        assert drawn == (int(probs.argmax()) if not temperature else by_id if unlimited else in_order)


def drawn_from_a_full_sort(logits, temperature, top_p, point):
    """Nucleus sampling as it is written down: sort everything, keep the fewest that hold p, invert their sums."""
    probs = (logits.double() / temperature).softmax(dim=-1)
    ordered, ids = probs.sort(descending=True, stable=True)
    kept = ordered.cumsum(dim=-1) - ordered < top_p
    mass = (ordered * kept).cumsum(dim=-1)
    return int(ids[(mass <= point * mass[-1]).sum()])


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 20.0])
def test_without_a_full_sort_the_draw_is_the_same(spread):
    """Token for token with the same random numbers, from flat distributions to sharp ones."""
    source = torch.Generator().manual_seed(int(spread * 2))
    for number in range(300):
        logits = torch.randn(640, generator=source) * spread + torch.rand(640, generator=source) * 1e-3
        temperature, top_p = (0.2, 0.65, 1.0, 1.7)[number % 4], (0.05, 0.5, 0.85, 0.95, 0.999)[number % 5]
        twin = torch.Generator().manual_seed(number)
        point = torch.rand(1, dtype=torch.float64, generator=twin)
        expected = drawn_from_a_full_sort(logits, temperature, top_p, point)
        assert Sampler(Sampling(temperature, top_p, seed=number))(logits) == expected


def test_equal_tokens_are_cut_to_the_fewest():
    frequencies = shares(Sampling(1.0, 0.5, seed=0), torch.zeros(10), 300)
    assert (frequencies > 0).sum() == 5


# --- rows side by side, as on a GPU -----------------------------------------------------------------------------------

MIXED = [
    GREEDY,
    Sampling(0.0, repetition_penalty=1.5),
    Sampling(1.0, 1.0),
    Sampling(0.65, 0.85),
    Sampling(1.5, 0.3),
    Sampling(1.0, 1.0, top_k=1),
    Sampling(1.3, 0.9, top_k=40),
    Sampling(1.3, 1.0, top_k=10_000),
    Sampling(2.0, 1.0, min_p=0.02),
    Sampling(1.1, 0.97, top_k=90, min_p=0.01, repetition_penalty=1.3),
    Sampling(0.9, 1.0, repetition_penalty=0.8),
    Sampling(float("inf"), 1.0),
    Sampling(1e-320, 0.5),
]


def drawn_side_by_side(logits, texts, samplers):
    in_text = torch.zeros(logits.shape, dtype=torch.bool)
    for row, text in zip(in_text, texts, strict=True):
        row[text] = True
    settings = [sampler.sampling for sampler in samplers]
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    columns = [[getattr(setting, name) for setting in settings] for name in names]
    points = [sampler.point for sampler in samplers]
    return draw_tokens(logits, in_text, *torch.tensor([points, *columns], dtype=torch.float64)).tolist()


@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_rows_side_by_side_draw_what_each_sampler_draws(spread):
    source = torch.Generator().manual_seed(int(2 * spread))
    for number in range(40):
        logits = torch.randn(len(MIXED), 700, generator=source) * spread
        texts = [torch.randint(0, 700, (20,), generator=source).tolist() for _ in MIXED]
        samplers = [Sampler(replace(sampling, seed=number + row)) for row, sampling in enumerate(MIXED)]
        together = drawn_side_by_side(logits, texts, samplers)
        assert together == [draw(*row) for draw, *row in zip(samplers, logits, texts, strict=True)]


def test_a_row_of_no_numbers_draws_some_token_and_the_others_theirs():
    logits = torch.randn(len(MIXED), 50, generator=torch.Generator().manual_seed(0))
    samplers = [Sampler(replace(sampling, seed=1)) for sampling in MIXED]
    expected = drawn_side_by_side(logits, [[]] * len(MIXED), samplers)
    for row in range(len(MIXED)):
        broken = logits.clone()
        broken[row] = torch.nan
        drawn = drawn_side_by_side(broken, [[]] * len(MIXED), samplers)
        assert 0 <= drawn.pop(row) < 50
        assert drawn == expected[:row] + expected[row + 1 :]


def test_random_numbers_are_made_ahead_and_come_in_their_order():
    sampler, points = Sampler(Sampling(1.0, 1.0, seed=3)), []
    for _ in range(70):
        points.append(sampler.point)
        assert sampler.point == points[-1], "it stays until it is spent"
        sampler.spend()
    source = torch.Generator().manual_seed(3)
    assert points == [float(torch.rand(1, dtype=torch.float64, generator=source)) for _ in points]
