"""The answers of an exported folder's model to the fixed prompts and images."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from minimind_v.core.errors import RunError
from minimind_v.core.export.prove import ask_hf
from minimind_v.core.export.prove.cases import CASES, images


def ask(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """The answers of a folder's model to the cases. Raises RunError where it cannot be opened."""
    with tempfile.TemporaryDirectory(prefix="mmv-verify-") as work:
        names = [str(Path(work) / f"{number}.png") for number in range(len(images()))]
        for name, image in zip(names, images(), strict=True):
            image.save(name)
        cases = [{"messages": case.standard, "pictures": [names[n] for n in case.images]} for case in CASES]
        try:
            return ask_hf.ask(str(folder), cases, dtype)
        except Exception as error:  # libraries raise many kinds
            reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
            raise RunError(f"transformers could not open the export ({reason:.300}); the export was removed") from error
