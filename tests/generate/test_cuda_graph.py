"""What is recorded gives what was done, or is not used."""

import inspect
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from minimind_v.core.generate import cuda_graph
from minimind_v.core.generate.cuda_graph import EAGER, Recordings, record_cuda

CPU = torch.device("cpu")


class StandIn:
    """For torch's CUDA graphs: takes what they take, and notes what happens."""

    takes = inspect.signature(torch.cuda.graph)

    def __init__(self, recordable):
        self.recordable, self.stream, self.current, self.done = recordable, "main", None, []

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.done.append("replayed"))

    @contextmanager
    def graph(self, *args, **options):
        self.takes.bind(*args, **options)
        _, self.pool, self.stream = args
        self.done.append(f"recording on {self.current}, {self.stream}")
        yield
        if not self.recordable:  # torch does not get to put the stream back
            raise RuntimeError("operation not permitted when stream is capturing")
        self.stream = "main"

    @contextmanager
    def device(self, device):
        self.current = device
        yield

    def Stream(self, device):
        return f"stream of {device}"

    def current_stream(self, device):
        return self.stream

    def set_stream(self, stream):
        self.stream = stream


@pytest.mark.parametrize("recordable", [True, False])
def test_what_cannot_be_recorded_is_done_step_by_step(monkeypatch, recordable):
    cuda, second = StandIn(recordable), torch.device("cuda:1")
    for name in ("CUDAGraph", "graph", "device", "Stream", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(cuda_graph, "_FAILED", [])
    monkeypatch.setattr(cuda_graph, "_stream", cuda.Stream)
    for _ in range(2):
        again = record_cuda(lambda: cuda.done.append("worked"), second, "pool")
        assert cuda.stream == "main"
        assert cuda.pool == "pool"
        assert (again is None) == (not recordable)
        if again:
            again()
    once = ["recording on cuda:1, stream of cuda:1", "worked"]
    assert cuda.done == ([*once, "replayed"] * 2 if recordable else once), "what has failed is not tried again"


class Adding:
    """Work that writes the sum of its input and its bias to logits; a recording adds `error` to it."""

    def __init__(self, error):
        self.input, self.logits, self.error = torch.zeros(3), torch.zeros(3), error
        self.recorded = self.replayed = self.worked = 0

    def work(self):
        self.worked += 1
        self.logits.copy_(self.input + 1)

    def record(self, work, device, pool):
        self.recorded += 1
        return None if self.error is None else self.replay

    def replay(self):
        self.replayed += 1
        self.logits.copy_(self.input + 1 + self.error)

    def run(self, recordings, steps, key="key"):
        for step in range(steps):
            self.input.fill_(step)
            recordings.run(key, self.work, self.logits)
            assert self.logits.tolist() == [step + 1] * 3


def test_a_step_is_recorded_after_some_and_replayed_from_then_on():
    adding = Adding(0)
    recordings = Recordings(CPU, adding.record)
    adding.run(recordings, EAGER)
    assert adding.recorded == 0
    adding.run(recordings, 5)
    assert (adding.recorded, adding.replayed, adding.worked) == (1, 4, EAGER + 2), "the first replay is compared"
    adding.run(recordings, EAGER + 2, "another key")
    assert adding.recorded == 2
    recordings.clear()
    adding.run(recordings, EAGER + 2)
    assert adding.recorded == 3


@pytest.mark.parametrize("error", [None, 0.5, torch.nan], ids=["not recorded", "wrong", "not a number"])
def test_a_recording_that_is_wrong_is_never_used_and_that_is_said_once(error):
    adding = Adding(error)
    recordings = Recordings(CPU, adding.record)
    adding.run(recordings, EAGER)
    with pytest.warns(RuntimeWarning, match="cannot be recorded"):
        adding.run(recordings, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adding.run(recordings, 5)
        adding.run(recordings, EAGER + 5, "another key")
    assert adding.recorded == 1
    assert adding.replayed == (error is not None)


def test_deterministic_algorithms_are_not_recorded():
    adding = Adding(0)
    torch.use_deterministic_algorithms(True)
    try:
        adding.run(Recordings(CPU, adding.record), EAGER + 5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert adding.recorded == 0
