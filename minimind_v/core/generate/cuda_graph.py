"""Decoding steps as CUDA graphs: a step is recorded once, then replayed for each token.

One step of so small a model is some 200 kernels, and the host needs longer to launch them than a GPU to run them. A
recording launches them all at once, always with the same tensors.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

EAGER = 8  # steps that are launched one by one before one is recorded: a short answer is not worth a recording
CLOSE = 0.02  # of the largest logit: a replay that differs more from the step itself is wrong

Work = Callable[[], object]
Record = Callable[[Work, torch.device, Any], Work | None]  # work, its device and a pool → a function that repeats it


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
            torch.cuda.graph(graph, pool, _stream(device), capture_error_mode="thread_local"),
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


class Recordings:
    """The recorded steps of some tensors, by what decides their kernels."""

    def __init__(self, device: torch.device, record: Record = record_cuda) -> None:
        self.device, self.record = device, record
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.has_failed = False
        self.clear()

    def clear(self) -> None:
        """Forget all: the tensors are replaced by others."""
        self._replays: dict[Hashable, Work] = {}
        self._proven = set[Hashable]()
        self._steps = Counter[Hashable]()

    def run(self, key: Hashable, work: Work, logits: Tensor) -> None:
        """Do the work, or replay it. It writes to `logits`, and doing it twice is doing it once.

        A first replay, of other numbers than those that were recorded, must give what the work gives. If it does not,
        or cannot be recorded, nothing is recorded from then on.
        """
        if key in self._proven:
            self._replays[key]()
            return
        work()
        self._steps[key] += 1
        if self._steps[key] <= EAGER or self.has_failed or torch.are_deterministic_algorithms_enabled():
            return
        if key not in self._replays:
            replay = self.record(work, self.device, self.pool)
            if replay is None:
                self._give_up()
            else:
                self._replays[key] = replay
            return
        expected = logits.clone()
        self._replays[key]()
        if bool((logits - expected).abs().max() <= CLOSE * expected.abs().max()):
            self._proven.add(key)
        else:
            self._give_up()
            work()

    def _give_up(self) -> None:
        self.has_failed = True
        self.clear()
        warnings.warn("a decoding step cannot be recorded: answers are slower", RuntimeWarning, stacklevel=4)
