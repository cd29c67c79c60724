"""Holds a run in a step until a test has done its part, so that no machine is too busy for it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from minimind_v.cli.live import TrainView

STEP = "TEST_STEP"  # the variable that names the step
UNTIL = "TEST_UNTIL"  # the variable that names a file


def stay() -> None:
    """Let the leading process report that step, and go on when SIGTERM has come or the file exists."""
    report, last, end = TrainView.step, int(os.environ[STEP]), Path(os.environ[UNTIL])
    signals: list[int] = []

    def report_and_stay(view, metrics, logged):
        report(view, metrics, logged)
        if metrics.step == last:
            heed = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *received: (signals.append(received[0]), heed(*received)))
            while not signals and not end.exists():
                time.sleep(0.01)

    TrainView.step = report_and_stay
