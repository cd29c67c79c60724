"""Batches in transit from a data worker to the trainer, in memory without a separate limit.

torch writes every tensor from a worker into a file in /dev/shm. A container has 64 MB there, and a batch without room
is lost without an error: the trainer waits for it for ever. A `Parcel` is one anonymous file (memfd) for all tensors of
a step, which counts as memory of the process and needs no folder. The worker packs it while it prepares the step, so
that every failure is an error of that step.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from itertools import accumulate
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNED = 64  # bytes: tensors begin at multiples


class Parcel:
    """An object with tensors, to be opened once, in another process."""

    def __init__(self, content: Any) -> None:
        """Raises OSError or MemoryError if there is no room for it."""
        tensors: list[pickle.PickleBuffer] = []
        head = io.BytesIO()
        _Pickler(head, protocol=5, buffer_callback=tensors.append).dump(content)
        blocks = [head.getbuffer(), *(tensor.raw() for tensor in tensors)]
        blocks.insert(0, memoryview(np.array([len(block) for block in blocks], np.int64).tobytes()))
        self._sizes = len(blocks) - 1
        self._data: bytes | None = None
        try:
            handle = os.memfd_create("mmv-batch")
        except (AttributeError, OSError):  # not Linux, or forbidden: send all bytes through the workers' pipe
            self._data = b"".join(bytes(block) + bytes(-len(block) % ALIGNED) for block in blocks)
            return
        try:
            for block in blocks:
                _write(handle, block)
            self._handle = reduction.DupFd(handle)
        finally:
            os.close(handle)

    def open(self) -> Any:
        """The packed object. Raises OSError or EOFError if the process that packed it has ended."""
        buffer: bytearray | mmap.mmap
        if self._data is not None:
            buffer = bytearray(self._data)
        else:
            handle = self._handle.detach()
            try:
                buffer = mmap.mmap(handle, 0)
            finally:
                os.close(handle)
        view = memoryview(buffer)
        sizes = np.frombuffer(view, np.int64, self._sizes).tolist()
        begins = list(accumulate((size + -size % ALIGNED for size in (8 * self._sizes, *sizes)), initial=0))[1:-1]
        head, *rest = (view[begin : begin + size] for begin, size in zip(begins, sizes, strict=True))
        return pickle.loads(head, buffers=rest)

    def pin_memory(self) -> Any:
        """torch's DataLoader calls this for transfers to a CUDA device, in a thread of its own."""
        return [batch.pin_memory() for batch in self.open()]


def _write(handle: int, data: memoryview) -> None:
    left = memoryview(data)
    while len(left):
        left = left[os.write(handle, left) :]
    os.lseek(handle, -len(data) % ALIGNED, os.SEEK_CUR)
    os.truncate(handle, os.lseek(handle, 0, os.SEEK_CUR))


class _Pickler(pickle.Pickler):
    """Pickles tensors without their bytes."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        flat: Any = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(flat), value.dtype, value.shape)


def _tensor(buffer: Any, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if not len(buffer):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
