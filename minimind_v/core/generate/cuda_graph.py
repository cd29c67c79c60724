"""One decoding step as a CUDA graph: recorded once, then replayed for each token.

One step of so small a model is some 200 kernels, and the host needs longer to launch them than a GPU to run them. A
recording launches them all at once, always with the same tensors: the inputs of a step are copied into them, and
attention always spans the same columns of the cache, of which a mask hides the later ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from minimind_v.core.model.kv_cache import KVCache

SPAN = 256  # columns by which the width of a recording grows
EAGER = 8  # steps that are launched one by one before one is recorded: a short answer is not worth a recording

Work = Callable[[], object]


class Columns(Protocol):
    """The storage of a row's keys and values."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [1, KV, T, hd]; returns all stored ones, [1, KV, S, hd]."""


# x, positions, columns of each row, their masks [1, 1, 1, S] → logits
Step = Callable[[Tensor, Tensor, Sequence[Columns], Sequence[Tensor]], Tensor]
Record = Callable[[Work, torch.device], Work | None]  # → a function that repeats the work without Python, or None


def record_cuda(work: Work, device: torch.device, pool: Any = None) -> Work | None:
    """The work as a CUDA graph; None if it cannot be recorded, and None at every later call.

    `pool` is memory that several graphs may share if none is replayed during another.
    """
    if _FAILED:  # the allocator may believe that it still records
        return None
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"),
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
    """The recordings of one model's steps, one for each company of rows, and another when one has grown beyond it."""

    def __init__(self, record: Record = record_cuda) -> None:
        self.record = record
        self._recordings: WeakKeyDictionary[KVCache, Recording] = WeakKeyDictionary()  # by the first row

    def __call__(self, step: Step, x: Tensor, positions: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """Logits [B, V] of one token per row, x [B, 1, D] at positions [B, 1], whose columns exist already.

        The step must be the same at every call.
        """
        recording = self._recordings.get(caches[0])
        if recording is None or not recording.covers(caches):
            recording = self._recordings[caches[0]] = Recording(caches, x)
        recording.x.copy_(x)
        recording.positions.copy_(positions)
        return recording.read(step, self.record)


class Recording:
    """The step of some rows. (It holds no step, which may hold what holds it.)"""

    def __init__(self, caches: Sequence[KVCache], x: Tensor) -> None:
        self.caches = [ref(cache) for cache in caches]
        self.x = torch.empty_like(x)
        self.positions = torch.empty(len(x), 1, dtype=torch.int64, device=x.device)
        self.rows = [Span(cache, position) for cache, position in zip(caches, self.positions, strict=True)]
        self.logits: Tensor | None = None
        self.steps = 0
        self.replay: Work | None = None

    def covers(self, caches: Sequence[KVCache]) -> bool:
        """Whether it is of these rows, and none has more columns."""
        return [cache() for cache in self.caches] == list(caches) and all(
            cache.used <= row.span for cache, row in zip(caches, self.rows, strict=True)
        )

    def read(self, step: Step, record: Record) -> Tensor:
        """Do the step, or replay it → logits [B, V]."""
        work = functools.partial(self._work, step)
        if self.steps == EAGER:
            self.replay = record(work, self.x.device)
        self.steps += 1
        (self.replay or work)()
        assert self.logits is not None
        return self.logits.clone()

    def _work(self, step: Step) -> None:
        logits = step(self.x, self.positions, self.rows, [row.mask() for row in self.rows])
        if self.logits is None:
            self.logits = logits
        else:
            self.logits.copy_(logits)


class Span:
    """The first columns of a row's cache; the present one, at the row's position [1], is the last that counts."""

    def __init__(self, cache: KVCache, position: Tensor) -> None:
        self.span, self.position = min(-(-cache.used // SPAN) * SPAN, cache.max_length), position
        self.keys, self.values = (tensor[..., : self.span, :] for tensor in (cache.keys, cache.values))
        self.columns = torch.arange(self.span, device=position.device)

    def mask(self) -> Tensor:
        """[1, 1, 1, S], true for columns up to the present one."""
        return (self.columns <= self.position)[None, None, None]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As Columns.write."""
        tensors = self.keys[layer], self.values[layer]
        for tensor, new in zip(tensors, (keys, values), strict=True):
            tensor.index_copy_(2, self.position, new)
        return tensors
