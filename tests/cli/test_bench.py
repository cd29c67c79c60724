"""`mmv bench` measures with made-up weights, and says what limits."""

import pytest
import torch

from minimind_v.core import bench
from minimind_v.core.bench import _limit
from tests.cli.harness import run_mmv


def test_bench_for_a_program(monkeypatch):
    monkeypatch.setattr(bench, "SIDE", 256)
    monkeypatch.setattr(bench, "NEW_TOKENS", 8)
    rates = run_mmv("bench", "--preset", "demo", "--device", "cpu", "--json").json
    assert (rates["preset"], rates["device"], rates["dtype"]) == ("demo", "cpu", "float32")
    names = ("matmul_gflops", "clip_pictures", "decoded_pictures", "samples_first_epoch", "samples_later", "tokens")
    assert all(rates[name] > 0 for name in names)
    assert rates["samples_later"] > rates["samples_first_epoch"]
    encoding, training = 1 / rates["clip_pictures"], 1 / rates["samples_later"]
    assert 1 / rates["samples_first_epoch"] == pytest.approx(encoding + training)
    assert rates["limit"]


def test_the_rate_of_products_is_that_of_the_fastest(monkeypatch):
    ends = iter([1, 4, 10, 12, 20, 23, 30, 35, 40, 44, 50, 53, 60, 69])  # begins and ends of seven products
    monkeypatch.setattr(bench, "SIDE", 8)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ends))
    assert bench.matmul_rate(torch.device("cpu"), torch.float32) == 2 * 8**3 / 2


@pytest.mark.parametrize(
    ("encoding", "training", "data", "limit"),
    [(3, 1, 0.1, "encoding images: 75%"), (1, 3, 0.1, "the language model: 75%"), (1, 1, 2.5, "decoding")],
)
def test_what_limits(encoding, training, data, limit):
    assert _limit(encoding, training, data).startswith(limit)


def test_mistakes():
    ended = run_mmv("bench", "--preset", "smal")
    assert ended.code == 2
    assert "did you mean 'small'" in ended.err
    assert run_mmv("bench", "--device", "toaster").code == 2
