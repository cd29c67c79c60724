"""Products with a weight that stays: laid out once for a number of rows, not again at every call."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MADV_PAGEOUT = 21  # Linux


class Product:
    """x [N, in] → x weightᵀ + scale · bias [N, out] of a linear layer, in fp32 on a CPU, for one N.

    A library for matrix products copies a weight into an order of its own before it multiplies, which for few hundred
    rows is a fifth of the time. Where torch has MKL, that is done here, in advance.
    """

    def __init__(self, linear: nn.Linear, rows: int, scale: float = 1.0) -> None:
        self.rows, self.weight, self.bias = rows, linear.weight, linear.bias * scale
        self.packed = None
        if torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear"):
            self.packed = torch.ops.mkl._mkl_reorder_linear_weight(linear.weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, self.rows)


def set_aside(weight: Tensor) -> None:
    """Tell the system that a weight will hardly be read again: one that is mapped from a file need not stay in memory.

    Changes nothing but that, and does nothing where the system is not Linux.
    """
    if sys.platform == "linux":
        begin = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = weight.data_ptr() + weight.nbytes
        if end > begin:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_PAGEOUT)


def state_of(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Differs when a tensor is another one, or has been written to."""
    return [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors]
