"""Verify an exported folder: stock transformers opens it in a separate process, and the answers are compared."""

from __future__ import annotations

from pathlib import Path

from minimind_v.core.export.prove.cases import ask
from minimind_v.core.export.prove.report import Report
from minimind_v.core.files import in_use
from minimind_v.core.formats.request import ExportRequest


def verify(order: ExportRequest, folder: Path) -> Report:
    """Compare `folder` with its source on fixed prompts and images: ids, pixels, logits, greedy tokens.

    Call it in a separate process: the folder answers before any model code of mmv is imported; then the source replaces
    the folder's model. Raises RunError where the folder cannot be opened.
    """
    with in_use(folder):
        answers = ask(folder)
        from minimind_v.core.export.prove.compare_hf import compare

        return compare(order, folder, answers)
