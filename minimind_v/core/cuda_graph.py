"""Work of a GPU as CUDA graphs: recorded, compared with the work itself, then replayed.

Work of so small a model is some hundred kernels, and a host needs longer to launch them than a GPU to run them. A
recording launches them all at once, always on the same tensors.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

EAGER = 8  # times that work is done kernel by kernel; then it is recorded: what comes seldom is not worth it
MOST = 192  # recordings of one kind of work; what comes later stays as it is
SPARE = 0.04  # of a GPU's memory is left: some drivers are said to take 64 kB for each kernel of a recording
TIES = 2  # a count may differ by so many: of equal logits either is the largest
WAITED = "called a synchronizing"  # in torch's warning of a wait; its notice about such warnings has other words

T = TypeVar("T")
Work = Callable[[], object]
Record = Callable[[Work, torch.device, Any], Work]  # work, its device and a `GraphPool` → a function that repeats it
Groups = Sequence[Sequence[Tensor]]  # tensors of one unit in each
State = Callable[[], Groups]

_LOCK = threading.Lock()  # torch records one graph at a time; and of the streams that are idle
_FAILED: list[object] = []  # recordings of this process that failed: the allocator may believe that they go on
_IDLE: list[torch.cuda.Stream] = []  # whose owners are gone


def own_stream(owner: object, device: torch.device) -> torch.cuda.Stream:
    """A stream that its owner has alone while it lives: torch has 32, and hands each of them out again and again."""
    with _LOCK:
        stream = next((idle for idle in reversed(_IDLE) if idle.device == device), None)
        if stream is None:
            stream = torch.cuda.Stream(device)
        else:
            _IDLE.remove(stream)
    weakref.finalize(owner, _IDLE.append, stream)
    return stream


class GraphPool:
    """Memory that graphs of one kind share, since none is replayed in another, and the stream of their recordings.

    cuBLAS keeps memory for each stream, within that of its first graph, and torch frees it with any graph of the stream
    (pytorch#193402). So a stream has graphs of one pool only. A pool is new where all its graphs are gone, since torch
    refuses one in which only cuBLAS still has memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream, self.handle = own_stream(self, device), torch.cuda.graph_pool_handle()


def record_cuda(work: Work, device: torch.device, pool: GraphPool) -> Work:
    """The work as a CUDA graph, which is replayed on the current stream. Raises RuntimeError."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with (
            torch.cuda.device(device),
            _without_gc(),
            torch.cuda.graph(graph, pool.handle, pool.stream, capture_error_mode="thread_local"),
        ):
            work()
    except torch.OutOfMemoryError:  # torch has ended the recording
        raise
    except RuntimeError:
        _FAILED.append(graph)  # the allocator may still have its address
        torch.cuda.set_stream(current)
        raise
    return graph.replay


@contextmanager
def _without_gc() -> Iterator[None]:
    """Collect no garbage meanwhile: to free an earlier graph would break a recording (pytorch#161037)."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@dataclass
class _Graph:
    calls: int = 0
    replay: Work | None = None
    proven: bool = False
    result: Any = None  # of the work when it was last done


class CudaGraphs:
    """One kind of work: done at first, then recorded, compared with its replay, then replayed.

    After a difference, a failure, a wait or a lack of memory nothing more is recorded or replayed, and a warning says
    so once. Where a recording of this process failed, nothing more is recorded.
    """

    def __init__(
        self, device: torch.device, what: str, warn: Callable[[str], None], close: float, record: Record = record_cuda
    ) -> None:
        """A warning says that `what`, such as "images are encoded", is done without graphs.

        A replay may differ from the work by the share `close` of what the work changes, and by no bit where algorithms
        are deterministic.
        """
        self.device, self.what, self.warn, self.close, self.record = device, what, warn, close, record
        self.on, self.most = True, MOST
        self.clear()

    def clear(self) -> None:
        """Forget all recordings: their tensors are replaced by others."""
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool: GraphPool | None = None  # which leaves its stream to the next one
        if self.device.type == "cuda":
            self._pool = GraphPool(self.device)

    @property
    def recorded(self) -> int:
        """The number of recordings."""
        return sum(graph.replay is not None for graph in self._graphs.values())

    def run(self, key: Hashable, work: Callable[[], T], results: Sequence[Tensor], state: State = tuple) -> T:
        """Do the work, or replay it; returns what the work returned when it was last done.

        `key` is what decides its kernels and its tensors, which stay. It writes `results`, each anew, and changes
        `state`. All its memory is allocated before it writes any of them, so that it may be done again where memory was
        full.
        """
        graph = self._graphs.setdefault(key, _Graph())
        graph.calls += 1
        if graph.proven and graph.replay is not None:
            graph.replay()
        elif graph.replay is not None:
            self._prove(graph, work, results, state)
        elif graph.calls == EAGER and self.on:
            self._do_and_record(graph, work)
        else:
            self._do(graph, work)
        result: T = graph.result
        return result

    def _do(self, graph: _Graph, work: Work) -> None:
        """Do the work; where its memory is taken by recordings, without them."""
        try:
            graph.result = work()
            return
        except torch.OutOfMemoryError:
            if not self.recorded:
                raise
        self._give_up("there is no memory for them")  # behind the error, which holds what failed in memory
        graph.result = work()

    def _do_and_record(self, graph: _Graph, work: Work) -> None:
        with _waits(self.device) as caught:
            self._do(graph, work)
        if any(WAITED in str(warning.message) for warning in caught):
            self._give_up("the work waits for the GPU")
        if not self.on:
            return
        trouble = ""
        with _LOCK:
            if _FAILED or self.recorded >= self.most or not _has_room(self.device):
                return
            try:
                graph.replay = self.record(work, self.device, self._pool)
            except torch.OutOfMemoryError:
                self.most = self.recorded
            except RuntimeError as error:
                trouble = str(error).partition("\n")[0] or type(error).__name__
        if trouble:
            self._give_up(f"it cannot be recorded ({trouble})")

    def _prove(self, graph: _Graph, work: Work, results: Sequence[Tensor], state: State) -> None:
        """Do the work, then replay it from the same state; its inputs are not those that it was recorded with."""
        groups, trouble = [*state(), *([result] for result in results)], "there is no memory to check it"
        try:
            before = _copies(groups)
        except torch.OutOfMemoryError:
            before = []
        if before:
            self._do(graph, work)
            if graph.replay is None:  # given up meanwhile
                return
            for [old] in before[-len(results) :]:
                old.zero_()  # so that a replay must write them
            with suppress(torch.OutOfMemoryError):
                trouble = self._difference(graph, groups, before)
            if not trouble:
                return
            _restore(groups, before)
        self._give_up(trouble)
        self._do(graph, work)

    def _difference(self, graph: _Graph, groups: Groups, before: Groups) -> str:
        """Replay work that was just done, from the state before it. Returns what is wrong, and else believes it."""
        assert graph.replay is not None
        expected = _copies(groups)
        changes = [_distances(*pair) for pair in zip(expected, before, strict=True)]
        if not torch.isfinite(torch.cat(changes)).all():  # a bad step proves nothing
            return ""
        _restore(groups, before)
        graph.replay()
        close = 0.0 if torch.are_deterministic_algorithms_enabled() else self.close
        graph.proven = all(
            # Some tensors of a group change by rounding alone: all may also differ by a share of the group's change.
            bool((_distances(*pair, TIES) <= close * (change + 0.01 * torch.linalg.vector_norm(change))).all())
            for pair, change in zip(zip(groups, expected, strict=True), changes, strict=True)
        )
        return "" if graph.proven else "it gives other results"

    def _give_up(self, reason: str) -> None:
        """Record and replay no more, and free the recordings' memory."""
        self.on = False
        for graph in self._graphs.values():
            graph.replay = None
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # after a failed recording torch believes that it still records, and refuses
                torch.cuda.empty_cache()
        self.warn(f"{self.what} without a CUDA graph, which takes longer: {reason}")


def _has_room(device: torch.device) -> bool:
    """Whether the largest work of this process still has room beside one recording more."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info(device)
    largest = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return free - largest >= SPARE * whole


def _copies(groups: Groups) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in group] for group in groups]


def _restore(groups: Groups, copies: Groups) -> None:
    for tensor, copy in zip(chain.from_iterable(groups), chain.from_iterable(copies), strict=True):
        tensor.copy_(copy)


def _distances(group: Sequence[Tensor], other: Sequence[Tensor], ties: int = 0) -> Tensor:
    """How far the tensors of a group are from others, [n]. Of a count, `ties` do not matter."""
    distances = []
    for tensor, others in zip(group, other, strict=True):
        distance = torch.linalg.vector_norm((tensor - others).float())
        distances.append(distance if tensor.is_floating_point() else (distance - ties).clamp(min=0))
    return torch.stack(distances)


@contextmanager
def _waits(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """Gives a list of what torch warns of meanwhile: on a GPU, of everything that waits for it.

    The mode and the list are those of the process, so that only its main thread, whose work is that of a run, asks.
    """
    if device.type != "cuda" or threading.current_thread() is not threading.main_thread():
        yield []
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode(mode)
