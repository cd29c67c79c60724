"""What is to be exported, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minimind_v.core.generate.load import Loaded, load_model


@dataclass(frozen=True)
class Order:
    """A model by the files that make it, and the precision that is wanted.

    `dtype` None: weights stay as they are stored. `quantize` is a name of GGUF's, and for GGUF only.
    """

    model: Path
    vision_model: Path | None = None
    tokenizer: Path | None = None
    dtype: str | None = None
    quantize: str | None = None

    def load(self) -> Loaded:
        """The source, on the CPU. Raises MissingInput or WeightsError."""
        return load_model(self.model, self.vision_model, self.tokenizer, "cpu")
