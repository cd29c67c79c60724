"""Verify an exported folder: stock transformers opens it in a separate process, and the answers are compared."""

from __future__ import annotations

from pathlib import Path

from minimind_v.core.export.prove.ask_cases import ask
from minimind_v.core.export.prove.report import Report
from minimind_v.core.files import in_use
from minimind_v.core.formats.request import ExportRequest


def verify(order: ExportRequest, folder: Path) -> Report:
    """Compare `folder` with its source on fixed prompts and pictures: ids, pixels, logits, greedy tokens.

    To be called in a process of its own, which has none of our code that computes before the folder has answered; then
    the source is loaded in the place of the folder's model. Raises RunError where the folder cannot be opened at all.
    """
    with in_use(folder):
        answers = ask(folder)
        from minimind_v.core.export.prove.compare_hf import compare

        return compare(order, folder, answers)
