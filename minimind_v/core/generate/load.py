"""Everything that using a trained model takes, from one weights file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minimind_v.core.checkpoint.folders import is_llava
from minimind_v.core.checkpoint.weights import Checkpoint, Receipt, load_into, read_checkpoint
from minimind_v.core.data.tokenizer import Tokenizer, find_tokenizer
from minimind_v.core.device import pick_device
from minimind_v.core.errors import WeightsError, open_all
from minimind_v.core.gguf.files import is_gguf, read_eye, read_tokenizer
from minimind_v.core.hub.sources import OUT_DIR, TOKENIZER_DIR, VISION_DIR, find_weights
from minimind_v.core.model.bare import Bare
from minimind_v.core.model.vision import VisionEncoder, VisionSpec
from minimind_v.core.model.vision_spec import read_config
from minimind_v.core.model.vlm import VLM


@dataclass(frozen=True)
class Loaded:
    """A model that can be talked to."""

    model: VLM
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    receipt: Receipt


def load_model(
    weights: Path | None, vision_model: Path | None = None, tokenizer: Path | None = None, device: str = "auto"
) -> Loaded:
    """Load weights (None: what the latest stage left in the standard folder), vision model and tokenizer.

    Where these two are not named, they are those that the weights' own folder has, else those of the standard folders.

    Raises MissingInput or WeightsError; a text-only base is refused, since it has no projector.
    """
    chosen = pick_device(device)  # a wrong name is told before anything is read
    weights = weights or find_weights(OUT_DIR)
    checkpoint = read_checkpoint(weights)
    vision_model, tokenizer = find_senses(weights, vision_model, tokenizer)
    require_senses(vision_model, tokenizer)
    encoder = read_eye(vision_model) if is_gguf(vision_model) else VisionEncoder.load(vision_model)
    words = read_tokenizer(tokenizer) if is_gguf(tokenizer) else Tokenizer.load(tokenizer)
    check_senses(checkpoint, words, tokenizer, encoder.spec, vision_model)
    with Bare():
        model = VLM(checkpoint.config, encoder.spec, words.placeholder_id, encoder)
    receipt = load_into(model, checkpoint)
    return Loaded(model.to(chosen).eval(), words, checkpoint, receipt)


def find_senses(weights: Path, vision_model: Path | None, tokenizer: Path | None) -> tuple[Path, Path]:
    """Where the vision model and the tokenizer of some weights are, unless they are named."""
    own = is_gguf(weights)
    vision_model = vision_model or (weights if own or (weights.is_dir() and is_llava(weights)) else VISION_DIR)
    tokenizer = tokenizer or (weights if own or (weights / "tokenizer.json").is_file() else TOKENIZER_DIR)
    return vision_model, tokenizer


def require_senses(vision_model: Path, tokenizer: Path) -> None:
    """Raises MissingInput that names both where both are missing."""
    both = (read_config, vision_model), (find_tokenizer, tokenizer)
    open_all(*(partial(find, path) for find, path in both if not is_gguf(path)))


def check_senses(
    checkpoint: Checkpoint, words: Tokenizer, tokenizer: Path, spec: VisionSpec, vision_model: Path
) -> None:
    """Raises WeightsError where weights, tokenizer and vision model do not belong together."""
    if words.vocab_size > checkpoint.config.vocab_size:
        raise WeightsError(
            f"{checkpoint.path} knows {checkpoint.config.vocab_size} tokens and the tokenizer in {tokenizer} has "
            f"{words.vocab_size} — they do not belong together (--tokenizer)"
        )
    width = checkpoint.vision_width
    if width is not None and width != spec.width:
        raise WeightsError(
            f"{checkpoint.path} was trained with features of width {width}, the vision model in {vision_model} "
            f"gives {spec.width} — name its own with --vision-model"
        )
