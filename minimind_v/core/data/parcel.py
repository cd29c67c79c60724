"""Batches in transit from a data worker to the trainer, in memory without a separate limit.

torch gives every tensor that leaves a worker a file in /dev/shm. A container has 64 MB there, and a batch that finds no
room is lost without a word: the trainer waits for it for ever. A `Parcel` is one anonymous file for all tensors of an
update (memfd), which counts as memory of the process and needs no folder. It is packed where the worker reads its rows,
so whatever fails there is an error of that update.
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

ALIGNED = 64  # bytes: where the tensors of a parcel begin


class Parcel:
    """Anything with tensors in it, to be opened once and in another process."""

    def __init__(self, content: Any) -> None:
        """Raises OSError or MemoryError where there is no room for it."""
        buffers: list[pickle.PickleBuffer] = []
        head = io.BytesIO()
        _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(content)
        buffers_ = [head.getbuffer(), *(buffer.raw() for buffer in buffers)]
        buffers_.insert(0, memoryview(np.array([len(data) for data in buffers_], np.int64).tobytes()))
        self._sizes = len(buffers_) - 1
        self._data: bytes | None = None
        try:
            handle = os.memfd_create("mmv-batch")
        except (AttributeError, OSError):  # not Linux, or not allowed: all of it goes through the workers' pipe
            self._data = b"".join(bytes(data) + bytes(-len(data) % ALIGNED) for data in buffers_)
            return
        try:
            for data in buffers_:
                _write(handle, data)
            self._handle = reduction.DupFd(handle)
        finally:
            os.close(handle)

    def open(self) -> Any:
        """What was packed. Raises OSError or EOFError where the process that did it is gone."""
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
        """Called by torch's DataLoader for transfers to a CUDA device, in a thread of its own."""
        return [batch.pin_memory() for batch in self.open()]


def _write(handle: int, data: memoryview) -> None:
    left = memoryview(data)
    while len(left):
        left = left[os.write(handle, left) :]
    os.lseek(handle, -len(data) % ALIGNED, os.SEEK_CUR)
    os.truncate(handle, os.lseek(handle, 0, os.SEEK_CUR))


class _Pickler(pickle.Pickler):
    """Leaves the bytes of tensors outside."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        flat: Any = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(flat), value.dtype, value.shape)


def _tensor(buffer: Any, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if not len(buffer):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
