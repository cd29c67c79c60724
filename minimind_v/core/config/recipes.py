"""The two recipes: complete run configurations for pretraining and for fine-tuning, with the published defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minimind_v.core.config.presets import PRESETS, weights_name
from minimind_v.core.config.schema import DataConfig, RunConfig, TextConfig
from minimind_v.core.hub.sources import DATASET_DIR, OUT_DIR, TOKENIZER_DIR, VISION_DIR

NO_INIT = Path("none")  # `--init none`: start from random weights


def pretrain(model: TextConfig = PRESETS["small"]) -> RunConfig:
    """Image-caption pairs; the projector and the last layer of the language model learn."""
    return RunConfig(
        stage="pretrain",
        model=model,
        data=DataConfig(
            file=DATASET_DIR / "pretrain_data.jsonl",
            images=DATASET_DIR / "pretrain_images.zip",
            tokenizer=TOKENIZER_DIR,
            max_length=640,
            batch_size=16,
        ),
        vision_model=VISION_DIR,
        init=OUT_DIR / weights_name("lm", model),
        out=OUT_DIR,
        freeze="projector+last",
        epochs=4,
        lr=4e-4,
    )


def sft(model: TextConfig = PRESETS["small"]) -> RunConfig:
    """Conversations about pictures; the projector and the whole language model learn."""
    return replace(
        pretrain(model),
        stage="sft",
        data=DataConfig(
            file=DATASET_DIR / "sft_data.jsonl",
            images=DATASET_DIR / "sft_images.zip",
            tokenizer=TOKENIZER_DIR,
            max_length=1536,
            batch_size=4,
        ),
        init=OUT_DIR / weights_name("pretrain", model),
        freeze="all",
        epochs=2,
        lr=1e-6,
    )


RECIPES = {"pretrain": pretrain, "sft": sft}
