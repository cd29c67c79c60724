"""The model card that goes with an exported folder."""

from __future__ import annotations

from pathlib import Path

from minimind_v.core.export.order import Order
from minimind_v.core.generate.load import Loaded


def write_card(folder: Path, loaded: Loaded, order: Order) -> None:
    """Write `README.md`."""
    (folder / "README.md").write_text("# card\n", encoding="utf-8")
