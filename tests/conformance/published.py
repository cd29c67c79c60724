"""Sets of numbers that the published code computed: where they are, and what they contain."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class PublishedSet:
    """A folder of numbers: the records of `cases.json`, the tensors that they name, and the folder of a tokenizer."""

    folder: Path
    tokenizer: Path
    record: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def archs(self) -> list[str]:
        return [name.removesuffix(".config") for name in self.record if name.endswith(".config")]


def open_set(variable: str, name: str, tokenizer: str, tokenizer_variable: str = "") -> PublishedSet:
    """The set in the folder that an environment variable names, else in `../shared`.

    Its tokenizer is in the folder that another variable names, else beside the set, else in `../shared`.
    Skips the test module that calls it, saying why, where a file is absent.
    """
    folder = ROOT / os.environ.get(variable, f"../shared/{name}")
    beside = folder.parent / tokenizer
    tokenizer_folder = beside if beside.is_dir() else ROOT / "../shared" / tokenizer
    tokenizer_folder = ROOT / os.environ.get(tokenizer_variable, tokenizer_folder)
    for needed in (folder / "cases.json", folder / "tensors.safetensors", tokenizer_folder / "tokenizer.json"):
        if not needed.is_file():
            pytest.skip(f"the published numbers are not here: no {needed}", allow_module_level=True)
    record = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    return PublishedSet(folder, tokenizer_folder, record, load_file(folder / "tensors.safetensors"))
