"""What must be there before a command begins, found without loading anything: all that is missing is told at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minimind_v.core.config.presets import name_preset
from minimind_v.core.config.recipes import NO_INIT
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.tokenizer import find_tokenizer
from minimind_v.core.errors import MissingInput, UsageError, open_all
from minimind_v.core.formats.generations import check_tower
from minimind_v.core.hub.sources import (
    STANDARD_PRESET,
    TOKENIZER_DIR,
    VISION_DIR,
    how_to_get,
    latest_model,
    weights_at,
)
from minimind_v.core.model.vision.spec import read_config
from minimind_v.core.rows.pictures import find_pictures
from minimind_v.core.rows.row import IMAGE_MARK
from minimind_v.core.rows.stores import find_rows


def find_inputs(config: RunConfig) -> None:
    """Raises MissingInput where a run lacks something that it begins with."""
    open_all(
        lambda: read_config(config.vision_model),
        lambda: find_tokenizer(config.data.tokenizer),
        lambda: find_rows(config.data.file),
        lambda: find_pictures(config.data.images),
        lambda: find_init(config),
    )
    check_tower(config.vision_model, find_init(config))


def find_init(config: RunConfig) -> Path | None:
    """The weights that a run starts from; None for random ones. Raises MissingInput with the command to get them."""
    if config.init is None or config.init == NO_INIT:
        return None
    try:
        return weights_at(config.init)
    except MissingInput as error:
        size = name_preset(config.model) or STANDARD_PRESET
        before = "`mmv train pretrain`" if config.stage == "sft" else how_to_get("lm", config.init.parent, size)
        raise MissingInput(f"{error} to start from — {before}, or name a file with --init") from None


def find_model(
    weights: Path | None, vision_model: Path | None, tokenizer: Path | None, say: Callable[[str], None]
) -> Path:
    """The weights that were named, or those that the latest stage or the demo left.

    Raises MissingInput where there are none, and tells then whether vision model and tokenizer are missing, too: where
    those of given weights are is known only when these are read.
    """
    try:
        return weights_at(weights) if weights else latest_model(say)
    except MissingInput as error:
        missing = error

        def nothing() -> Path:
            raise missing

        open_all(
            nothing,
            lambda: read_config(vision_model or VISION_DIR),
            lambda: find_tokenizer(tokenizer or TOKENIZER_DIR),
        )
        raise


def check_marks(question: str, pictures: int) -> None:
    """Raises UsageError where a question has marks for another number of pictures than there are."""
    marks = question.count(IMAGE_MARK)
    if marks and marks != pictures:
        raise UsageError(f"the question has {marks} {IMAGE_MARK} marks for {pictures} pictures")
