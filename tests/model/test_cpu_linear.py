"""Products with weights laid out in advance: by whichever library, the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from minimind_v.core.model.kernels.cpu_linear import FEW, SAME_BITS, product

OPS = torch.backends.mkl.is_available(), torch.backends.mkldnn.is_available()
HALF = "fbgemm" in torch.backends.quantized.supported_engines
pytestmark = pytest.mark.skipif(not (all(OPS) and HALF), reason="torch was built here without MKL, oneDNN or FBGEMM")

USED = {
    # weights of half precision, rows, the CPU's instructions, oneDNN → the operator
    (True, FEW, "AVX2", True): "quantized::linear_dynamic_fp16",
    (False, FEW, "AVX2", True): "mkldnn::_linear_pointwise",
    (False, FEW, "AVX512", True): "mkldnn::_linear_pointwise",
    (True, 197, "AVX2", True): "mkldnn::_linear_pointwise",
    (True, 197, "AVX512", True): "mkl::_mkl_linear",
    (False, 197, "AVX2", False): "aten::linear",
    (False, FEW, "DEFAULT", False): "aten::linear",
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", USED)
@torch.no_grad()
def test_whichever_library_is_used(monkeypatch, case, biased):
    half, rows, instructions, onednn = case
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    weight, bias = torch.randn(300, 200), torch.randn(300) if biased else None
    weight = weight.half().float() if half else weight
    multiply = product(weight, bias, rows)
    for count in (1, 2, 7, FEW, 197, 250):
        x = torch.randn(count, 200)
        with profile() as profiler:
            result = multiply(x)
        assert USED[case] in {event.key for event in profiler.key_averages()} or count != rows
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        ours, torchs = ((values - exact).square().mean().sqrt() for values in (result, F.linear(x, weight, bias)))
        assert ours < 4 * torchs + 1e-7, "something is rounded"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (768, 512), (512, 1408)])
@torch.no_grad()
def test_a_row_gets_the_same_bits_among_any_multiple_of_four(shape, half):
    weight, x = torch.randn(shape) * 0.05, torch.randn(FEW, shape[1])
    multiply = product(weight.half().float() if half else weight)
    alone = torch.cat([multiply(row.repeat(SAME_BITS, 1))[:1] for row in x.split(1)])
    for count in range(SAME_BITS, FEW + 1, SAME_BITS):
        assert torch.equal(multiply(x[:count]), alone[:count])


@torch.no_grad()
def test_without_mkl(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    weight, bias = torch.randn(30, 20), torch.randn(30)
    with_mkl = product(weight, bias, 197)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    without_mkl = product(weight, bias, 197)
    for x in (torch.randn(197, 20), torch.randn(6, 20)):
        for multiply in (with_mkl, without_mkl):
            torch.testing.assert_close(multiply(x), x @ weight.T + bias)
        with profile() as profiler:
            without_mkl(x)
        assert "mkl::_mkl_linear" not in {event.key for event in profiler.key_averages()}


@torch.no_grad()
def test_weights_that_half_precision_cannot_hold_are_kept_whole():
    x = torch.ones(1, 8)
    for value in (1 + 2**-11, 1e-9, 1e6, float("inf")):  # between its numbers, below, above
        weight = torch.full((1, 8), value)
        assert product(weight)(x) == x @ weight.T
    assert product(torch.full((1, 8), float("nan")))(x).isnan()


@torch.no_grad()
def test_elsewhere_it_is_torchs_own():
    weight, x = torch.randn(30, 20, dtype=torch.bfloat16), torch.randn(3, 20, dtype=torch.bfloat16)
    assert torch.equal(product(weight)(x), F.linear(x, weight))
