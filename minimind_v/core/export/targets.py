"""What a model can be written as that is a folder: how each is written, and how it is proven.

A target writes what an order names into an empty folder, which gets its name only when the report finds nothing wrong
(`folder.py`). Where that is asked for, what was written is opened as its users would, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minimind_v.core.export.order import Made, Order
from minimind_v.core.export.report import Report
from minimind_v.core.export.worker import Worker


def _to_hf(order: Order, folder: Path, check: bool) -> tuple[Made, Report]:
    """Two processes, so that source and export are never in memory together; the second imports while the first writes.

    This one has no torch, unless the caller brought it.
    """
    if not check:
        from minimind_v.core.export import hf

        return hf.make(order, folder), Report()
    with Worker("minimind_v.core.export.probe") as prover:
        with Worker() as maker:
            made = maker.call("minimind_v.core.export.hf:make", order, folder)
        return made, prover.call("minimind_v.core.export.verify_hf:verify", order, folder)


def _to_gguf(order: Order, folder: Path, check: bool) -> tuple[Made, Report]:
    from minimind_v.core.export import gguf, verify_gguf

    loaded = gguf.make(order, folder)
    made = Made.of(loaded.checkpoint)
    return made, verify_gguf.verify(loaded, folder, order) if check else Report()


TARGETS: dict[str, Callable[[Order, Path, bool], tuple[Made, Report]]] = {"hf": _to_hf, "gguf": _to_gguf}
