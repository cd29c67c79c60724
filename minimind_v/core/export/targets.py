"""What a model can be written as that is a folder: one table of how each is written, and how it is proven.

A target writes into an empty folder, which gets its name only when `verify` has found nothing wrong (`folder.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from minimind_v.core.export import gguf, hf, verify_gguf, verify_hf
from minimind_v.core.export.order import Order
from minimind_v.core.export.report import Verify
from minimind_v.core.generate.load import Loaded


@dataclass(frozen=True)
class Target:
    """A kind of folder.

    `write(loaded, folder, order)` writes all files; `loaded.checkpoint.tensors` are the weights as they are stored,
    `loaded.model` has them in fp32 with the vision tower. `verifier()` is entered before anything is written, and gives
    the function that opens what was written as its users would, in a process of its own, and compares it with `loaded`.
    """

    write: Callable[[Loaded, Path, Order], None]
    verifier: Callable[[], AbstractContextManager[Verify]]


TARGETS = {
    "hf": Target(hf.write, verify_hf.verifier),
    "gguf": Target(gguf.write, verify_gguf.verifier),
}
