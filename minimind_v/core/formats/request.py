"""What is to be exported, and how; and what was made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minimind_v.core.errors import WeightsError

if TYPE_CHECKING:  # whoever only gives an order needs no torch
    from minimind_v.core.formats.checkpoint import Checkpoint
    from minimind_v.core.formats.load import LoadedModel


@dataclass(frozen=True)
class ExportRequest:
    """A model by the files that make it, and the precision that is wanted.

    `dtype` None: weights stay as they are stored. `quantize` is a name of GGUF's, and for GGUF only.
    """

    model: Path
    vision_model: Path | None = None
    tokenizer: Path | None = None
    dtype: str | None = None
    quantize: str | None = None

    def load(self) -> LoadedModel:
        """The source, on the CPU. Raises MissingInput or WeightsError."""
        from minimind_v.core.formats.load import load_model

        return load_model(self.model, self.vision_model, self.tokenizer, "cpu")

    def refuse_layout(self, layout: str) -> None:
        """Raises WeightsError for a chat layout that folders for other programs have no template of."""
        if layout != "chatml":
            raise WeightsError(
                f"{self.model} was trained with the chat layout {layout}, and a folder for other programs holds only "
                "chatml — convert to safetensors or pth"
            )


@dataclass(frozen=True)
class Made:
    """What a folder was made of."""

    stage: str
    preset: str | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Made:
        from minimind_v.core.config.presets import name_preset

        return cls(checkpoint.stage, name_preset(checkpoint.config))
