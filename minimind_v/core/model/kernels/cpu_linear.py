"""Linear layers on the CPU with weights packed once, not at every call."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

MADV_PAGEOUT = 21  # Linux
FEW = 16  # rows
SAME_BITS = 4  # a multiple of so many rows gives each row the same bits

Product = Callable[[Tensor], Tensor]


def product(weight: Tensor, bias: Tensor | None = None, rows: int = FEW) -> Product:
    """x [N, in] → x weightᵀ + bias [N, out], for a weight that stays. Right for any N, laid out for about `rows`.

    A library for matrix products copies a weight into its own order before it multiplies. Here this happens once, in
    fp32 on a CPU, by the library that was measured to be the fastest:

    - few rows: a token costs the time to read the weights. If all are half-precision numbers, as published ones are,
      FBGEMM reads 2 bytes of each, and multiplies and adds in fp32: nothing is rounded. Its kernels for one and for two
      rows add in another order than those for more: only multiples of four rows get the bits of any other (SAME_BITS).
    - else MKL for CPUs with AVX-512, where it was a tenth faster than oneDNN; without it oneDNN was.
    """
    weight = weight.detach()
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x: F.linear(x, weight, bias)
    ops, instructions = torch.ops, torch.backends.cpu.get_cpu_capability()
    half = "fbgemm" in torch.backends.quantized.supported_engines and hasattr(ops.quantized, "linear_dynamic_fp16")
    mkl = torch.backends.mkl.is_available() and hasattr(ops.mkl, "_mkl_linear")
    onednn = torch.backends.mkldnn.is_available() and hasattr(ops.mkldnn, "_linear_pointwise")
    if half and rows <= FEW and torch.equal(weight.half().float(), weight):
        packed = ops.quantized.linear_prepack_fp16(weight, bias)
        return lambda x: ops.quantized.linear_dynamic_fp16(x, packed)
    if mkl and rows > FEW and "AVX512" in instructions:
        packed = ops.mkl._mkl_reorder_linear_weight(weight, rows)
        return lambda x: ops.mkl._mkl_linear(x, packed, weight, bias, rows)
    if onednn:
        packed = ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda x: ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def page_out(weight: Tensor) -> None:
    """Let Linux drop a weight from memory that will hardly be read again, if it is mapped from a file."""
    if sys.platform == "linux":
        begin = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = weight.data_ptr() + weight.nbytes
        if end > begin:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_PAGEOUT)


def state_of(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """A value that differs after a tensor was replaced or written to."""
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
