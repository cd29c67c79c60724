"""What a model can be written as that is a folder: how each is written, and how it is proven.

A target writes what an order names into an empty folder, which gets its name only when the report finds nothing wrong
(`folder.py`). Where that is asked for, what was written is opened as its users would, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minimind_v.core.export.prove.report import Report
from minimind_v.core.export.prove.worker import Worker
from minimind_v.core.formats.request import ExportFacts, ExportRequest


def _to_hf(order: ExportRequest, folder: Path, check: bool) -> tuple[ExportFacts, Report]:
    """Two processes, so that source and export are never in memory together; the second imports while the first writes.

    This one has no torch, unless the caller brought it.
    """
    if not check:
        from minimind_v.core.formats.hf import write as hf

        return hf.make(order, folder), Report()
    with Worker("minimind_v.core.export.prove.ask_hf") as prover:
        with Worker() as maker:
            made = maker.call("minimind_v.core.formats.hf.write:make", order, folder)
        return made, prover.call("minimind_v.core.export.prove.verify_hf:verify", order, folder)


def _to_gguf(order: ExportRequest, folder: Path, check: bool) -> tuple[ExportFacts, Report]:
    from minimind_v.core.export.prove import verify_gguf
    from minimind_v.core.formats.gguf import write as gguf

    loaded = gguf.make(order, folder)
    made = ExportFacts.of(loaded.checkpoint)
    return made, verify_gguf.verify(loaded, folder, order) if check else Report()


TARGETS: dict[str, Callable[[ExportRequest, Path, bool], tuple[ExportFacts, Report]]] = {"hf": _to_hf, "gguf": _to_gguf}
