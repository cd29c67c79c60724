"""What the tests of the command line share: tiny data, weights, and one run of both stages by the installed command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from minimind_v.core.train import forecast
from tests.cli import harness
from tests.cli.harness import Ended, TinyData
from tests.web import serving


@pytest.fixture(scope="session")
def tiny_data() -> TinyData:
    return harness.tiny_data()


@pytest.fixture(scope="session")
def sighted() -> Path:
    return harness.sighted()


@pytest.fixture
def web() -> Iterator[Callable[[bytes], str]]:
    """`web(content)` is the address of a file with this content on a server of this machine."""
    with ExitStack() as stack:
        yield lambda content: stack.enter_context(serving(content))[0]


@pytest.fixture
def guessed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a run is a guess: to measure it takes seconds."""
    monkeypatch.setattr(forecast, "estimate", lambda *_: forecast.Estimate(5400.0, "a guess"))


@dataclass
class Trained:
    """What the two stages, run by the installed command, left and said."""

    out: Path
    pretrain: Ended
    sft: Ended


@pytest.fixture(scope="session")
def trained(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`mmv train pretrain`, then `mmv train sft`, which finds by itself what pretraining has left."""
    out = tmp_path_factory.mktemp("trained") / "out"
    pretrain = harness.installed(*tiny_data.train(out, lr=1e-3, workers=1))
    sft = harness.installed(
        *tiny_data.train(out, "sft", lr=1e-4, workers=1, init=None, accumulate=2, epochs=2, log_every=3)
    )
    return Trained(out, pretrain, sft)
