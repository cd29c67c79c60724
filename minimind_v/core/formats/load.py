"""Everything that using a trained model takes, from one weights file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.device import pick_device
from minimind_v.core.errors import MissingInput, WeightsError
from minimind_v.core.formats.checkpoint import Checkpoint, Receipt, load_into, match_tensors, read_checkpoint
from minimind_v.core.formats.companions import Companion, tidy, tokenizer_digest, vision_digest
from minimind_v.core.formats.generations import check_tokenizer, check_tower
from minimind_v.core.formats.gguf.read import is_gguf, read_tokenizer, read_vision_encoder
from minimind_v.core.formats.hf.names import published_shapes
from minimind_v.core.formats.hf.read import is_llava
from minimind_v.core.formats.vision_tower import load_encoder
from minimind_v.core.hub.sources import OUT_DIR, TOKENIZER_DIR, VISION_DIR, how_to_get, latest_model
from minimind_v.core.model.no_init import NoInit
from minimind_v.core.model.vision.encoder import VisionSpec
from minimind_v.core.model.vlm import VLM


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be talked to."""

    model: VLM
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    receipt: Receipt


def silent(message: str) -> None:
    """Where nobody listens."""


def load_model(
    weights: Path | None,
    vision_model: Path | None = None,
    tokenizer: Path | None = None,
    device: str = "auto",
    say: Callable[[str], None] = silent,
) -> LoadedModel:
    """Load weights (None: what the latest stage left in the standard folder), vision model and tokenizer.

    Where these two are not named, `find_senses` finds them. `say` is given a line about each choice that is not plain.
    Raises MissingInput or WeightsError; a text-only base is refused, since it has no projector.
    """
    chosen = pick_device(device)  # a wrong name is told before anything is read
    checkpoint = read_checkpoint(weights or latest_model(say))
    paths = find_companions(checkpoint, vision_model, tokenizer, say)
    encoder = (
        read_vision_encoder(paths.vision_model) if is_gguf(paths.vision_model) else load_encoder(paths.vision_model)
    )
    words = (
        read_tokenizer(paths.tokenizer)
        if is_gguf(paths.tokenizer)
        else Tokenizer.load(paths.tokenizer, checkpoint.companions.layout)
    )
    check_companions(checkpoint, paths, words, encoder.spec, encoder.tower.state_dict(), say)
    match_tensors(
        checkpoint, published_shapes(checkpoint.config, encoder.spec.width), checkpoint.config
    )  # before memory is taken
    with NoInit():
        model = VLM(checkpoint.config, encoder.spec, words.placeholder_id, encoder)
    receipt = load_into(model, checkpoint)
    return LoadedModel(model.to(chosen).eval(), words, checkpoint, receipt)


# --- the vision model and the tokenizer of some weights ---------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One of the two: what it is called, the file that makes a folder one, and where it comes from."""

    name: str
    file: str
    what: str  # to download
    option: str
    standard: Path

    def is_at(self, path: Path) -> bool:
        return (path / self.file).is_file() or is_gguf(path)


VISION = Kind("vision model", "config.json", "clip", "--vision-model", VISION_DIR)
TOKENIZER = Kind("tokenizer", "tokenizer.json", "tokenizer", "--tokenizer", TOKENIZER_DIR)


@dataclass(frozen=True)
class CompanionPaths:
    """Where the vision model and the tokenizer of some weights are, and which of them the user named."""

    vision_model: Path
    tokenizer: Path
    named: frozenset[Kind]


def find_companions(
    checkpoint: Checkpoint, vision_model: Path | None, tokenizer: Path | None, say: Callable[[str], None] = silent
) -> CompanionPaths:
    """Find both: as named, else in the weights' own folder, else where their run had them, else in standard folders.

    The standard folders of the project that the weights lie in come before those of the working folder.
    Raises MissingInput, which names both where both are missing.
    """
    weights, companions = checkpoint.path, checkpoint.companions
    has_vision = is_gguf(weights) or (weights.is_dir() and is_llava(weights))
    has_tokenizer = is_gguf(weights) or TOKENIZER.is_at(weights)
    paths = CompanionPaths(
        vision_model or (weights if has_vision else _find(VISION, weights, companions.vision_model, say)),
        tokenizer or (weights if has_tokenizer else _find(TOKENIZER, weights, companions.tokenizer, say)),
        frozenset(kind for kind, path in ((VISION, vision_model), (TOKENIZER, tokenizer)) if path),
    )
    missing = [
        _how_to_mend(kind, path, None if kind in paths.named else companion)
        for kind, path, companion in (
            (VISION, paths.vision_model, companions.vision_model),
            (TOKENIZER, paths.tokenizer, companions.tokenizer),
        )
        if not kind.is_at(path)
    ]
    if missing:
        raise MissingInput(*missing)
    check_tower(paths.vision_model, weights)
    return paths


def _find(kind: Kind, weights: Path, companion: Companion | None, say: Callable[[str], None]) -> Path:
    """The first place of the companion where it is, else the standard folder, whatever is there."""
    if companion and (place := next(filter(kind.is_at, companion.places), None)):
        return place
    standard = kind.standard
    out = weights.parent.resolve()
    if out.name == OUT_DIR.name and kind.is_at(out.parent / standard):  # the standard folder of the weights' project
        standard = tidy(out.parent / standard)
    if companion and companion.digest is None and kind.is_at(standard):  # otherwise `check_senses` compares
        say(f"the {kind.name} of the run is no longer in {companion.places[-1]}: using the one in {standard}")
    return standard


def _how_to_mend(kind: Kind, path: Path, companion: Companion | None) -> str:
    if companion is None:
        return f"no {kind.name} in {path} ({kind.file} is missing) — {how_to_get(kind.what, path)}"
    return f"the {kind.name} of the run is no longer in {companion.places[-1]} — name its folder with {kind.option}"


def check_companions(
    checkpoint: Checkpoint,
    paths: CompanionPaths,
    words: Tokenizer,
    spec: VisionSpec,
    tower: Mapping[str, Tensor],
    say: Callable[[str], None] = silent,
) -> None:
    """Raises WeightsError where weights, tokenizer and vision model do not belong together.

    One of the right size that is not the one of the run is only reported where the user has named it.
    """
    check_tokenizer(words, paths.tokenizer, checkpoint.path)
    if words.vocab_size > checkpoint.config.vocab_size:
        raise WeightsError(
            f"{checkpoint.path} knows {checkpoint.config.vocab_size} tokens and the tokenizer in {paths.tokenizer} "
            f"has {words.vocab_size}: {words.last_token!r} has no row in the weights — name their own tokenizer "
            f"(--tokenizer), or train with --set model.vocab_size={words.vocab_size}"
        )
    width = checkpoint.vision_width
    if width is not None and width != spec.width:
        raise WeightsError(
            f"{checkpoint.path} was trained with features of width {width}, the vision model in {paths.vision_model} "
            f"gives {spec.width} — name its own with --vision-model"
        )
    for kind, companion, path, digest in (
        (VISION, checkpoint.companions.vision_model, paths.vision_model, vision_digest(spec, tower)),
        (TOKENIZER, checkpoint.companions.tokenizer, paths.tokenizer, tokenizer_digest(words)),
    ):
        if companion is None or companion.digest in (None, digest):
            continue
        trouble = f"{checkpoint.path} was trained with another {kind.name} than the one in {path}"
        if kind not in paths.named:
            raise WeightsError(f"{trouble} — name the folder of its own with {kind.option}")
        say(trouble)
