"""Export targets: the formats of an export, by name.

A target writes the model of a request, and proves it: it opens the result as a user would, and compares it with the
source. A folder gets its name only when its report finds nothing wrong (`folder.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minimind_v.core.export.prove.report import Report
from minimind_v.core.export.prove.worker import Worker
from minimind_v.core.extensions import Table
from minimind_v.core.formats.request import ExportFacts, ExportRequest


@dataclass(frozen=True)
class Target:
    """A format. `write` gets the request, the path, and whether to prove the result.

    The path is an empty folder, or that of a file, which `write` writes atomically. Raises WeightsError for a model
    that the format cannot hold.
    """

    help: str
    write: Callable[[ExportRequest, Path, bool], tuple[ExportFacts, Report]]
    ending: str = ""  # of the file; empty: a folder
    quantizes: bool = False  # the type is given by --quantize, not by --dtype


def _to_hf(request: ExportRequest, folder: Path, check: bool) -> tuple[ExportFacts, Report]:
    """Two processes, so that source and export are never in memory together; one imports while the other writes.

    This process imports no torch.
    """
    if not check:
        from minimind_v.core.formats.hf import write as hf

        return hf.make(request, folder), Report()
    with Worker("minimind_v.core.export.prove.ask_hf") as prover:
        with Worker() as writer:
            facts = writer.call("minimind_v.core.formats.hf.write:make", request, folder)
        return facts, prover.call("minimind_v.core.export.prove.verify_hf:verify", request, folder)


def _to_gguf(request: ExportRequest, folder: Path, check: bool) -> tuple[ExportFacts, Report]:
    from minimind_v.core.export.prove import verify_gguf
    from minimind_v.core.formats.gguf import write as gguf

    loaded = gguf.make(request, folder)
    report = verify_gguf.verify(loaded, folder, request) if check else Report()
    if not gguf.holds_images(loaded.config):
        tower, projector = loaded.config.vision.model_type, loaded.config.projector
        report.add("images", f"not in the export: llama.cpp has no form for {tower} with the projector {projector} — "
                             "`mmv convert --to hf` writes the whole model")  # fmt: skip
    return ExportFacts.of(loaded.checkpoint), report


def _to_weights(request: ExportRequest, path: Path, check: bool) -> tuple[ExportFacts, Report]:
    from minimind_v.core.export.weights_file import write_weights

    return write_weights(request, path)  # always proves it: reading a file is quick


TARGETS = Table(
    {
        "hf": Target("a folder for transformers", _to_hf),
        "gguf": Target("a folder for llama.cpp and Ollama", _to_gguf, quantizes=True),
        "safetensors": Target("a file of the weights", _to_weights, ".safetensors"),
        "pth": Target("a file of the weights, as published", _to_weights, ".pth"),
    }
)
