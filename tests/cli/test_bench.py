"""`mmv bench` measures with made-up weights, and says what limits."""

import pytest

from minimind_v.core.bench import _limit
from tests.cli.harness import here


def test_bench_for_a_program():
    found = here("bench", "--preset", "demo", "--device", "cpu", "--json").json
    assert (found["preset"], found["device"], found["dtype"]) == ("demo", "cpu", "float32")
    rates = ("matmul_gflops", "clip_pictures", "decoded_pictures", "samples_first_epoch", "samples_later", "tokens")
    assert all(found[name] > 0 for name in rates)
    assert found["samples_later"] > found["samples_first_epoch"]
    looking, learning = 1 / found["clip_pictures"], 1 / found["samples_later"]
    assert 1 / found["samples_first_epoch"] == pytest.approx(looking + learning)
    assert found["limit"]


@pytest.mark.parametrize(
    ("looking", "learning", "data", "limit"),
    [(3, 1, 0.1, "encoding images: 75%"), (1, 3, 0.1, "the language model: 75%"), (1, 1, 2.5, "decoding")],
)
def test_what_limits(looking, learning, data, limit):
    assert _limit(looking, learning, data).startswith(limit)


def test_mistakes():
    ended = here("bench", "--preset", "smal")
    assert ended.code == 2
    assert "did you mean 'small'" in ended.err
    assert here("bench", "--device", "toaster").code == 2
