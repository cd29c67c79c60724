"""A run that is long enough compiles its decoder, and says it where that fails."""

from types import SimpleNamespace

import pytest
import torch

from minimind_v.core.train import run as module
from tests.model.conftest import tiny_vlm


class Events:
    def __init__(self):
        self.lines = []

    def message(self, line):
        self.lines.append(f"message: {line}")

    def warning(self, line):
        self.lines.append(f"warning: {line}")


@pytest.mark.parametrize(("total", "done", "tries"), [(1000, 0, 1), (999, 0, 0), (5000, 4500, 0)])
@pytest.mark.parametrize("reason", [None, "no compiler"])
def test_the_steps_that_are_left_decide(monkeypatch, total, done, tries, reason):
    calls, events = [], Events()

    def compile_decoder(decoder, precision):
        with precision():
            calls.append((decoder, torch.is_autocast_enabled("cpu")))
        return reason

    monkeypatch.setattr(module, "compile_decoder", compile_decoder)
    model = tiny_vlm()
    run = SimpleNamespace(
        total=total,
        progress=SimpleNamespace(done=done),
        train_step=SimpleNamespace(model=model),
        config=SimpleNamespace(dtype="bfloat16"),
    )
    module._compile(run, events)
    assert calls == [(model.model, True)] * tries
    assert model.training == bool(tries)
    assert [line.split(":")[0] for line in events.lines] == ["message", "warning"][: tries + bool(reason)] * tries
    assert not tries or not reason or reason in events.lines[-1]
