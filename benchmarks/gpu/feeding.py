"""How many rows the data workers deliver, with nobody who learns from them."""

from __future__ import annotations

import os
import time
from contextlib import closing

from benchmarks.gpu.card import Card, Result
from benchmarks.gpu.runs import StepListener, configure, make_run
from minimind_v.core.data.loader import load_steps

ROWS = {  # of the material → kinds of picture, and whether their features are read
    "pretrain": {"128² JPEG": False, "stored features": True},
    "large": {"448×336 JPEG": False},
}


def feeding(card: Card, result: Result) -> None:
    """Rows per second by the number of workers, for each kind of picture."""
    cores = os.cpu_count() or 1
    numbers = (1,) if card.tiny else tuple(n for n in (1, 4, 8, 15) if n <= max(1, cores - 1))
    for rows in ROWS:
        run = make_run(configure(card, "small", "pretrain", data=rows, features="exact"), StepListener())
        store = run.train_step.features.store
        for kind, remembered in ROWS[rows].items():
            run.plan.dataset.remembered = store if remembered else None
            for workers in numbers:
                result.setdefault(kind, {})[str(workers)] = _rate(run.plan, workers, 0.2 if card.tiny else 1.5)


def _rate(plan, workers: int, seconds: float) -> float:
    """Rows per second, the first updates of each worker left out."""
    rows, begun, ready = 0, 0.0, 2 * workers
    with closing(load_steps(plan, workers)) as steps:
        for number, step in enumerate(steps):
            now = time.perf_counter()
            if number == ready:
                begun = now
            elif number > ready:
                rows += sum(map(len, step))
                if now - begun > seconds:
                    break
    return round(rows / (now - begun), 1)
