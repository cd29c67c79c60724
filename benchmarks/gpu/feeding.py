"""How many rows the data workers deliver, with nobody who learns from them."""

from __future__ import annotations

import os
import time
from contextlib import closing

from benchmarks.gpu.card import Card, Found
from benchmarks.gpu.runs import Hearer, configure, make_run
from minimind_v.core.data.loader import load_updates

KINDS = {  # rows of the material, whether their features are read
    "128² JPEG": ("pretrain", False),
    "448×336 JPEG": ("large", False),
    "features": ("pretrain", True),
}


def feeding(card: Card, found: Found) -> None:
    """Rows per second by the number of workers, for each kind of picture."""
    cores = os.cpu_count() or 1
    numbers = (1,) if card.tiny else tuple(n for n in (1, 4, 8, 12, 15) if n <= max(1, cores - 1))
    run = make_run(configure(card, "small", "pretrain", features="exact"), Hearer())
    store = run.memory.store
    for kind, (rows, remembered) in KINDS.items():
        plan = make_run(configure(card, "small", "pretrain", data=rows), Hearer()).plan
        plan.dataset.remembered = store if remembered else None
        for workers in numbers:
            found.setdefault(kind, {})[str(workers)] = _rate(plan, workers, 0.2 if card.tiny else 1.5)


def _rate(plan, workers: int, seconds: float) -> float:
    """Rows per second, the first updates of each worker left out."""
    rows, begun, ready = 0, 0.0, 2 * workers
    with closing(load_updates(plan, workers)) as updates:
        for number, update in enumerate(updates):
            now = time.perf_counter()
            if number == ready:
                begun = now
            elif number > ready:
                rows += sum(map(len, update))
                if now - begun > seconds:
                    break
    return round(rows / (now - begun), 1)
