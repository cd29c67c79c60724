"""Requests for exports, and the facts that the manifest of an exported folder holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minimind_v.core.errors import WeightsError

if TYPE_CHECKING:  # a command that only asks for an export imports no torch
    from minimind_v.core.config.generation import Generation
    from minimind_v.core.formats.checkpoint import Checkpoint
    from minimind_v.core.formats.load import LoadedModel


@dataclass(frozen=True)
class ExportRequest:
    """A model by its files, and the precision of the export.

    `dtype` None: weights keep their type. `quantize` is a GGUF type, for GGUF only.
    """

    model: Path
    vision_model: Path | None = None
    tokenizer: Path | None = None
    dtype: str | None = None
    quantize: str | None = None

    def load(self) -> LoadedModel:
        """The source, on the CPU. Raises MissingInput or WeightsError."""
        from minimind_v.core.formats.load import load

        return load(self.model, self.vision_model, self.tokenizer, "cpu")

    def refuse_layout(self, layout: str, generation: Generation) -> None:
        """Raises WeightsError for a chat layout that folders for other programs have no template of."""
        if layout != generation.layout:
            raise WeightsError(
                f"{self.model} was trained with the chat layout {layout}, and a folder for other programs holds only "
                f"{generation.layout} — convert to safetensors or pth"
            )


@dataclass(frozen=True)
class ExportFacts:
    """The source of an exported folder, for its manifest."""

    stage: str
    preset: str | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ExportFacts:
        from minimind_v.core.config.presets import name_preset

        return cls(checkpoint.stage, name_preset(checkpoint.config))
