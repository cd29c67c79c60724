"""One decoding step as a CUDA graph: recorded once, then replayed for each token.

One step of so small a model is some 200 kernels, and the host needs longer to launch them than a GPU to run them. A
recording launches them all at once, always with the same tensors: the inputs of a step are copied into them, and
attention always spans the same columns of the cache, of which a mask hides the later ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from minimind_v.core.model.kv_cache import KVCache

SPAN = 256  # columns by which the width of a recording grows
EAGER = 8  # steps that are launched one by one before one is recorded: a short answer is not worth a recording

Work = Callable[[], object]


class Columns(Protocol):
    """The storage of a step's keys and values, and of all that it attends to."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, KV, T, hd]; returns all stored ones, [B, KV, S, hd]."""


Step = Callable[[Tensor, Tensor, Tensor, Columns], Tensor]  # x, positions, mask [B, 1, 1, S], columns → logits
Record = Callable[[Work, torch.device], Work | None]  # → a function that repeats the work without Python, or None


def record_cuda(work: Work, device: torch.device) -> Work | None:
    """The work as a CUDA graph; None if it cannot be recorded, and None at every later call."""
    if _FAILED:  # the allocator may believe that it still records
        return None
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"),
        ):
            work()
    except RuntimeError:
        _FAILED.append(graph)  # the allocator may still have its address
        torch.cuda.set_stream(before)
        return None
    return graph.replay


_FAILED: list[object] = []


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one, since cuBLAS keeps memory for each


class Replay:
    """The recordings of one model's steps, one for each cache, and another when the cache has grown beyond it."""

    def __init__(self, record: Record = record_cuda) -> None:
        self.record = record
        self._recordings: WeakKeyDictionary[KVCache, Recording] = WeakKeyDictionary()

    def __call__(self, step: Step, x: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Logits [B, V] of one token per row, x [B, 1, D] at positions [B or 1, 1], whose column exists already.

        The step must be the same at every call.
        """
        recording = self._recordings.get(cache)
        if recording is None or not recording.covers(cache):
            recording = self._recordings[cache] = Recording(cache, x)
        recording.prepare(x, positions, cache)
        return recording.read(step, self.record)


class Recording:
    """The step of a cache's rows over its first `span` columns. (It holds no step, which may hold what holds it.)"""

    def __init__(self, cache: KVCache, x: Tensor) -> None:
        self.rows, self.span = len(x), min(-(-cache.used // SPAN) * SPAN, cache.max_length)
        self.keys, self.values = (tensor[..., : self.span, :] for tensor in (cache.keys, cache.values))
        self.x = torch.empty_like(x)
        self.positions = torch.empty(self.rows, 1, dtype=torch.int64, device=x.device)
        self.column = torch.empty(1, dtype=torch.int64, device=x.device)
        self.columns = torch.arange(self.span, device=x.device)
        self.mask = torch.empty(self.rows, 1, 1, self.span, dtype=torch.bool, device=x.device)
        self.logits: Tensor | None = None
        self.steps = 0
        self.replay: Work | None = None

    def covers(self, cache: KVCache) -> bool:
        """Whether the cache has these rows, and no more columns."""
        return cache.keys.shape[1] == self.rows and cache.used <= self.span

    def prepare(self, x: Tensor, positions: Tensor, cache: KVCache) -> None:
        """Copy the inputs of the next step into the recording's tensors."""
        self.x.copy_(x)
        self.positions.copy_(positions)
        self.column.fill_(cache.used - 1)
        self.mask.copy_(self.columns < cache.used)
        if cache.padding is not None:
            self.mask.logical_and_(~cache.padding[:, None, None, : self.span])

    def read(self, step: Step, record: Record) -> Tensor:
        """Do the step, or replay it → logits [B, V]."""
        work = functools.partial(self._work, step)
        if self.steps == EAGER:
            self.replay = record(work, self.x.device)
        self.steps += 1
        (self.replay or work)()
        assert self.logits is not None
        return self.logits.clone()

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As Columns.write."""
        tensors = self.keys[layer], self.values[layer]
        for tensor, new in zip(tensors, (keys, values), strict=True):
            tensor.index_copy_(2, self.column, new)
        return tensors

    def _work(self, step: Step) -> None:
        logits = step(self.x, self.positions, self.mask, self)
        if self.logits is None:
            self.logits = logits
        else:
            self.logits.copy_(logits)
