"""The two generations of published models: which vision encoder, projector, tokenizer and recipes belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minimind_v.core.config.schedule import COSINE_2025, COSINE_2026, Cosine
from minimind_v.core.config.schema import CLIP_VISION, LINEAR, MLP, SIGLIP_VISION, TextConfig
from minimind_v.core.paths import TOKENIZER_3V_DIR, TOKENIZER_DIR, VISION_3V_DIR, VISION_DIR


@dataclass(frozen=True)
class StageSettings:
    """The published settings of a stage."""

    epochs: int
    batch_size: int
    max_length: int  # tokens per row, placeholders included
    lr: float
    freeze: str
    start: str  # the stage whose weights it starts from; lm: the text-only base


@dataclass(frozen=True)
class Generation:
    """What belongs to the language models of one generation."""

    name: str
    year: int
    preset: str  # its first preset, for hints
    towers: tuple[str, ...]  # model_type of its vision encoder: of the tower alone, of a whole model
    vision_encoder: str  # the name of its vision encoder
    vision_model: Path  # the standard folder of that
    tokenizer: Path  # the standard folder of its tokenizer
    projector: str
    layout: str  # of its prompts
    base: str  # how the names of its text-only bases begin
    cosine: Cosine  # of its learning rates
    data: int  # the form of its data, an index of `dataset_files`
    stages: dict[str, StageSettings]


V2025 = Generation(
    name="MiniMind-V (2025)",
    year=2025,
    preset="small",
    towers=(CLIP_VISION, "clip"),
    vision_encoder="CLIP",
    vision_model=VISION_DIR,
    tokenizer=TOKENIZER_DIR,
    projector=LINEAR,
    layout="chatml",
    base="lm",
    cosine=COSINE_2025,
    data=1,
    stages={
        "pretrain": StageSettings(4, 16, 640, 4e-4, "projector+last", "lm"),
        "sft": StageSettings(2, 4, 1536, 1e-6, "all", "pretrain"),
    },
)
# Its data for fine-tuning contains that for pretraining, so fine-tuning starts from the language model.
V2026 = Generation(
    name="minimind-3v (2026)",
    year=2026,
    preset="3v",
    towers=(SIGLIP_VISION, "siglip", "siglip2_vision_model", "siglip2"),
    vision_encoder="SigLIP",
    vision_model=VISION_3V_DIR,
    tokenizer=TOKENIZER_3V_DIR,
    projector=MLP,
    layout="chatml-think",
    base="llm",
    cosine=COSINE_2026,
    data=0,
    stages={
        "pretrain": StageSettings(2, 16, 450, 4e-4, "projector", "lm"),
        "sft": StageSettings(2, 4, 768, 5e-6, "projector+ends", "lm"),
    },
)


def generation_of(model: TextConfig) -> Generation:
    """The generation of a language model: the heads of minimind-3v have norms."""
    return V2026 if model.qk_norm else V2025
