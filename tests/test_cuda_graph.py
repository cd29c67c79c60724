"""What is recorded gives what was done, or is not used."""

from __future__ import annotations

import gc
import inspect
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from minimind_v.core import cuda_graph
from minimind_v.core.cuda_graph import EAGER, TIES, CudaGraphs, GraphPool, own_stream, record_cuda

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_has_failed(monkeypatch):
    monkeypatch.setattr(cuda_graph, "_FAILED", [])


# --- CUDA -------------------------------------------------------------------------------------------------------------


class StandIn:
    """For torch's CUDA graphs: takes what they take, and notes what happens."""

    takes = inspect.signature(torch.cuda.graph)

    def __init__(self, recordable):
        self.recordable, self.stream, self.current, self.done = recordable, "main", None, []
        self.pools = self.streams = 0

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.done.append("replayed"))

    @contextmanager
    def graph(self, *args, **options):
        self.takes.bind(*args, **options)
        _, self.pool, self.stream = args
        self.done.append(f"recording on {self.current}, {self.stream.name}")
        yield
        if not self.recordable:  # torch does not get to put the stream back
            raise RuntimeError("operation not permitted when stream is capturing")
        self.stream = "main"

    @contextmanager
    def device(self, device):
        self.current = device
        yield

    def Stream(self, device):
        self.streams += 1
        return SimpleNamespace(device=device, name=f"stream {self.streams} of {device}")

    def current_stream(self, device):
        return self.stream

    def set_stream(self, stream):
        self.stream = stream

    def graph_pool_handle(self):
        self.pools += 1
        return self.pools

    def empty_cache(self):
        if cuda_graph._FAILED:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")


@pytest.fixture
def make_cuda(monkeypatch):
    def make(recordable=True):
        cuda = StandIn(recordable)
        for name in ("CUDAGraph", "graph", "device", "Stream", "current_stream", "set_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
        for name in ("graph_pool_handle", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
        for name, answer in {"mem_get_info": (9, 10), "max_memory_allocated": 0, "memory_allocated": 0}.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
        monkeypatch.setattr(cuda_graph, "_waits", lambda device: nullcontext([]))
        monkeypatch.setattr(cuda_graph, "_IDLE", [])
        return cuda

    return make


@pytest.mark.parametrize("recordable", [True, False])
def test_work_is_recorded_on_a_stream_of_its_own(make_cuda, recordable):
    cuda, second = make_cuda(recordable), torch.device("cuda:1")
    with nullcontext() if recordable else pytest.raises(RuntimeError, match="capturing"):
        record_cuda(lambda: cuda.done.append("worked"), second, GraphPool(second))()
    assert (cuda.stream, cuda.pool) == ("main", 1)
    assert cuda.done == ["recording on cuda:1, stream 1 of cuda:1", "worked", *["replayed"] * recordable]
    assert len(cuda_graph._FAILED) == (not recordable)


def make_pools(*devices):
    """Graphs of several kinds, and the numbers of the stream and the memory of each."""
    kinds = [CudaGraphs(torch.device(device), "it is done", str, 0.0) for device in devices]
    return kinds, [(int(kind._pool.stream.name.split()[1]), kind._pool.handle) for kind in kinds]


def test_no_two_kinds_are_recorded_on_one_stream(make_cuda):
    """A graph that is freed takes cuBLAS's memory with it, which all graphs of its stream use."""
    make_cuda()
    kinds, pools = make_pools("cuda:0", "cuda:0", "cuda:1")
    assert pools == [(1, 1), (2, 2), (3, 3)]
    del kinds[0]
    assert make_pools("cuda:1", "cuda:0")[1] == [(4, 4), (1, 5)], "the streams of kinds that are gone come again"


def test_what_works_beside_a_recording_has_another_stream(make_cuda):
    """torch has 32, and hands them out in turn: the next one may be that of another kind."""
    make_cuda()
    device, (kinds, _) = torch.device("cuda:0"), make_pools("cuda:0")
    owners = [Adding() for _ in range(2)]
    streams = [own_stream(owner, device) for owner in owners]
    assert [stream.name for stream in streams] == ["stream 2 of cuda:0", "stream 3 of cuda:0"]
    del owners[0]
    kinds[0].clear()
    assert own_stream(owners[0], device) is streams[0]


def test_what_is_recorded_after_all_was_forgotten_has_other_memory(make_cuda):
    make_cuda()
    [graphs], pools = make_pools("cuda:0")
    graphs.clear()
    assert pools == [(1, 1)]
    assert (graphs._pool.stream.name, graphs._pool.handle) == ("stream 1 of cuda:0", 2)


@pytest.mark.parametrize("collecting", [True, False])
def test_no_garbage_is_collected_during_a_recording(collecting, make_cuda):
    """An earlier graph may be part of it, and may not be freed then."""
    make_cuda()
    device, states = torch.device("cuda:0"), []
    (gc.enable if collecting else gc.disable)()
    try:
        record_cuda(lambda: states.append(gc.isenabled()), device, GraphPool(device))
        assert (states, gc.isenabled()) == ([False], collecting)
    finally:
        gc.enable()


def test_a_recording_that_fails_ends_those_of_the_whole_process(make_cuda):
    """The others keep what they have, and say nothing."""
    device, warnings = torch.device("cuda:0"), []
    make_cuda(recordable=False)
    failing, other = (CudaGraphs(device, what, warnings.append, 0.0) for what in ("it is done", "else is done"))
    adding, kept = Adding(), Adding()
    failing.record, other.record = lambda work, *where: record_cuda(list, *where), kept.record
    kept.run(other, EAGER + 2)
    adding.run(failing, EAGER + 2)
    kept.run(other, EAGER + 2, "another key")
    kept.run(other, 3)
    assert (other.recorded, other.on, kept.recorded) == (1, True, 1)
    reason = "it cannot be recorded (operation not permitted when stream is capturing)"
    assert warnings == [f"it is done without a CUDA graph, which takes longer: {reason}"]


def test_only_the_main_thread_asks_what_waits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    modes, counts = [], []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def ask():
        with cuda_graph._waits(torch.device("cuda")) as caught:
            cuda_graph.warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        counts.append(len(caught))

    ask()
    assert (modes, counts) == (["warn", 0], [1])
    with pytest.warns(UserWarning, match="synchronizing"):
        ThreadPoolExecutor(1).submit(ask).result()
    assert (modes, counts) == (["warn", 0], [1, 0])


# --- any work ---------------------------------------------------------------------------------------------------------


class Adding:
    """Work that adds its input to a sum and writes how many it added; `replay` does the same, and `error` more."""

    def __init__(self, error=0.0, more=0):
        self.input, self.sum, self.other = torch.zeros(3), torch.zeros(3), torch.zeros(3)
        self.norm, self.count = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        self.error, self.more, self.recorded, self.replayed, self.worked = error, more, 0, 0, 0

    def work(self):
        self.worked += 1
        self.add()
        return "done"

    def add(self):
        self.sum += self.input
        self.norm.copy_(self.input.norm())
        self.count.fill_(int(self.input[0]))

    def record(self, work, device, pool):
        self.recorded += 1
        return self.replay

    def replay(self):
        self.replayed += 1
        self.add()
        self.sum += self.error
        self.count += self.more

    def state(self):
        return [[self.sum, self.other]]

    def run(self, graphs, steps, key="key"):
        for step in range(1, steps + 1):
            before = self.sum + 10 * step
            self.input.fill_(10 * step)
            assert graphs.run(key, self.work, [self.norm, self.count], self.state) == "done"
            assert torch.equal(self.sum, before), f"step {step}"


@pytest.fixture
def warnings():
    return []


def make_graphs(adding, warnings, close=0.05):
    return CudaGraphs(CPU, "it is done", warnings.append, close, adding.record)


def test_work_is_recorded_after_some_times_and_replayed_from_then_on(warnings):
    adding = Adding()
    graphs = make_graphs(adding, warnings)
    adding.run(graphs, EAGER - 1)
    assert adding.recorded == 0
    adding.run(graphs, 5)
    assert (adding.recorded, adding.replayed, adding.worked) == (1, 4, EAGER + 1), "the first replay is compared"
    adding.run(graphs, EAGER + 2, "another key")
    assert graphs.recorded == adding.recorded == 2
    graphs.clear()
    adding.run(graphs, EAGER + 2)
    assert adding.recorded == 3
    assert not warnings


def missing(adding):
    """A replay that changes nothing."""
    adding.add = lambda: None


def without_result(adding):
    """A replay that does not write how much it added: what the work wrote stays there."""
    adding.add = lambda: adding.sum.add_(adding.input)


WRONG = {
    "wrong": lambda adding: adding.__dict__.update(error=20.0),
    "not a number": lambda adding: adding.__dict__.update(error=torch.nan),
    "what must stay": lambda adding: adding.other.add_(5),
    "a wrong count": lambda adding: adding.__dict__.update(more=30),
    "nothing": missing,
    "an old result": without_result,
}


@pytest.mark.parametrize("trouble", WRONG)
def test_a_replay_that_differs_is_never_used_and_that_is_said_once(trouble, warnings):
    adding, add = Adding(), Adding.add
    graphs = make_graphs(adding, warnings)
    replay = adding.replay

    def spoiled():
        WRONG[trouble](adding)
        replay()
        adding.add, adding.error, adding.more = lambda: add(adding), 0.0, 0

    adding.replay = spoiled
    adding.run(graphs, EAGER + 5)
    adding.run(graphs, EAGER + 5, "another key")
    assert torch.equal(adding.other, torch.zeros(3))
    assert (adding.recorded, adding.replayed, graphs.recorded) == (1, 1, 0)
    assert warnings == ["it is done without a CUDA graph, which takes longer: it gives other results"]


def test_rounding_and_a_tie_are_no_difference(warnings):
    """Also where a tensor does not change, and where the count is a small one."""
    adding = Adding(error=1e-3, more=TIES)
    graphs = make_graphs(adding, warnings)
    for _ in range(EAGER + 1):
        adding.input.fill_(1)
        graphs.run("key", adding.work, [adding.norm, adding.count], adding.state)
    assert adding.replayed == graphs.recorded == 1
    assert not warnings


@pytest.mark.parametrize("strict", ["bits", "deterministic"])
def test_where_bits_must_be_the_same_rounding_is_a_difference(strict, warnings):
    adding = Adding(error=1e-3)
    torch.use_deterministic_algorithms(strict == "deterministic")
    try:
        adding.run(make_graphs(adding, warnings, 0.0 if strict == "bits" else 0.05), EAGER + 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(warnings) == 1


def test_a_bad_step_proves_nothing(warnings):
    adding = Adding()
    graphs = make_graphs(adding, warnings)
    for step in range(EAGER + 3):
        adding.input.fill_(torch.nan if step == EAGER else 1)
        adding.count.fill_(0)
        adding.add = lambda: (adding.sum.add_(adding.input), adding.norm.copy_(adding.input[0]), adding.count.fill_(1))
        graphs.run("key", adding.work, [adding.norm, adding.count], lambda: [[adding.other]])
    assert (adding.worked, adding.replayed) == (EAGER + 2, 2)
    assert not warnings


def test_work_that_waits_is_not_recorded(warnings, monkeypatch):
    caught = [SimpleNamespace(message="called a synchronizing CUDA operation")]
    monkeypatch.setattr(cuda_graph, "_waits", lambda device: nullcontext(caught))
    adding = Adding()
    adding.run(make_graphs(adding, warnings), EAGER + 3)
    assert adding.recorded == 0
    assert warnings == ["it is done without a CUDA graph, which takes longer: the work waits for the GPU"]


def test_a_notice_of_torch_about_its_warnings_is_no_wait(warnings, monkeypatch):
    notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(cuda_graph, "_waits", lambda device: nullcontext([SimpleNamespace(message=notice)]))
    adding = Adding()
    adding.run(make_graphs(adding, warnings), EAGER + 3)
    assert adding.recorded == 1
    assert not warnings


@pytest.mark.parametrize("where", ["the copies", "the copies behind the work", "the comparison"])
def test_a_recording_is_not_used_where_memory_does_not_suffice_to_check_it(where, warnings, monkeypatch):
    adding = Adding()
    graphs, calls = make_graphs(adding, warnings), []
    name = "_distances" if where == "the comparison" else "_copies"
    function, full = getattr(cuda_graph, name), 1 if where == "the copies behind the work" else 0

    def run_out(*args):
        calls.append(args)
        if len(calls) > full:
            raise torch.OutOfMemoryError
        return function(*args)

    adding.run(graphs, EAGER)
    monkeypatch.setattr(cuda_graph, name, run_out)
    adding.run(graphs, 4)
    assert graphs.recorded == 0
    assert warnings == ["it is done without a CUDA graph, which takes longer: there is no memory to check it"]


def test_work_without_memory_is_done_again_without_recordings(warnings):
    adding, full = Adding(), []
    graphs, work = make_graphs(adding, warnings), adding.work

    def run_out():
        if full:
            full.pop()
            raise torch.OutOfMemoryError
        return work()

    adding.work = run_out
    full.append(True)
    with pytest.raises(torch.OutOfMemoryError):  # nothing can be freed
        adding.run(graphs, 1)
    adding.run(graphs, EAGER + 2)
    full.append(True)
    adding.run(graphs, 3, "another key")
    adding.run(graphs, 3)
    assert (graphs.recorded, graphs.on) == (0, False)
    assert warnings == ["it is done without a CUDA graph, which takes longer: there is no memory for them"]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_recordings_leave_room_for_the_largest_work(make_cuda, monkeypatch):
    """They end where a driver has taken the rest, and those that exist stay."""
    make_cuda()
    device, warnings, adding = torch.device("cuda:0"), [], Adding()
    memory = {"mem_get_info": (400, 1000), "max_memory_allocated": 500, "memory_allocated": 200}
    for name in memory:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: memory[name])
    graphs = CudaGraphs(device, "it is done", warnings.append, 0.0, adding.record)
    adding.run(graphs, EAGER + 2)
    memory["mem_get_info"] = (339, 1000)
    adding.run(graphs, EAGER + 2, "another key")
    assert graphs.recorded == adding.recorded == 1
    assert not warnings


def test_a_recording_without_memory_is_the_last(warnings):
    adding = Adding()
    graphs, record = make_graphs(adding, warnings), adding.record

    def full(*work):
        if graphs.recorded:
            raise torch.OutOfMemoryError
        return record(*work)

    graphs.record = full
    for key in range(3):
        adding.run(graphs, EAGER + 2, key)
    adding.run(graphs, 3, 0)
    assert (graphs.recorded, adding.replayed, graphs.on) == (1, 5, True)
    assert not cuda_graph._FAILED
    assert not warnings
