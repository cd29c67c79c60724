"""Is an exported folder the same as its source? Asked of stock transformers, in a process that has nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from minimind_v.core.errors import RunError
from minimind_v.core.export.prove import ask_hf as probe
from minimind_v.core.export.prove.cases import CASES, pictures
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


def ask(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """What the model of a folder answers in the cases. Raises RunError where it cannot be opened."""
    with tempfile.TemporaryDirectory(prefix="mmv-verify-") as work:
        names = [str(Path(work) / f"{number}.png") for number in range(len(pictures()))]
        for name, picture in zip(names, pictures(), strict=True):
            picture.save(name)
        cases = [{"messages": case.standard, "pictures": [names[n] for n in case.pictures]} for case in CASES]
        try:
            return probe.ask(str(folder), cases, dtype)
        except Exception as error:  # whatever a library says of a folder that it cannot use
            reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
            raise RunError(f"transformers does not open what was written ({reason:.300}); nothing is left") from error
