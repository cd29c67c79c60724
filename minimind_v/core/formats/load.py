"""Open models: find and read weights, vision tower and tokenizer, and build the modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from minimind_v.core.config.generation import Generation, generation_of
from minimind_v.core.config.schema import LINEAR, MLP, ModelConfig, RunConfig, VisionSpec
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.device import pick_device
from minimind_v.core.errors import MissingInput, UsageError, WeightsError
from minimind_v.core.formats.checkpoint import Checkpoint, Receipt, load_into, match_tensors, read_checkpoint
from minimind_v.core.formats.companions import Companion, tidy, tokenizer_digest, vision_digest
from minimind_v.core.formats.generations import check_base, check_tokenizer, check_tower, open_spec, open_tokenizer
from minimind_v.core.formats.gguf import read as gguf
from minimind_v.core.formats.gguf.read import is_gguf
from minimind_v.core.formats.hf.names import published_shapes
from minimind_v.core.formats.hf.read import is_export
from minimind_v.core.formats.inputs import find_init
from minimind_v.core.formats.vision_tower import StoredTower, build_encoder, read_tower
from minimind_v.core.hub.sources import how_to_get, latest_model
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.no_init import NoInit
from minimind_v.core.model.projector import PREFIX, PROJECTORS, projector_shapes
from minimind_v.core.model.vision.preprocessing import read_preprocessing
from minimind_v.core.model.vlm import VLM
from minimind_v.core.paths import OUT_DIR


@dataclass(frozen=True)
class ModelParts:
    """A model as it is stored: tensors stay in their files until they are used, and there are no modules."""

    checkpoint: Checkpoint
    tower: StoredTower
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        """The model configuration. A text-only base gets the projector of its generation."""
        projector = self.checkpoint.projector or self.checkpoint.generation.projector
        return ModelConfig(self.checkpoint.config, self.tower.spec, projector)


@dataclass(frozen=True)
class LoadedModel:
    """A model that answers questions about images."""

    model: VLM
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    receipt: Receipt

    @property
    def config(self) -> ModelConfig:
        """The model configuration."""
        return self.model.model_config


def silent(message: str) -> None:
    """Discard a message."""


def load(
    weights: Path | None,
    vision_model: Path | None = None,
    tokenizer: Path | None = None,
    device: str = "auto",
    say: Callable[[str], None] = silent,
    new_projector: bool = False,
) -> LoadedModel:
    """Open a model in any format: `.pth`, `.safetensors`, a folder for transformers, GGUF. Weights are in fp32.

    Arguments and errors are those of `read_model_parts`. With `new_projector` a text-only base gets a projector with
    random weights.
    """
    chosen = pick_device(device)  # a wrong name is refused before anything is read
    stored = read_model_parts(weights, vision_model, tokenizer, say, new_projector)
    checkpoint, config = stored.checkpoint, stored.config
    encoder = build_encoder(stored.tower)
    with nullcontext() if new_projector else NoInit():
        model = VLM(config.text, config.vision, stored.tokenizer.placeholder_id, encoder, config.projector)
    receipt = load_into(model, checkpoint, new_projector)
    return LoadedModel(accelerate(model.to(chosen).eval(), chosen), stored.tokenizer, checkpoint, receipt)


def load_initial(config: RunConfig, say: Callable[[str], None] = silent) -> tuple[VLM, Tokenizer, Receipt]:
    """The model of a run with its initial weights in fp32, its tokenizer, and the receipt of the weights.

    Without `init` all weights are random, and the receipt names them as new. Draws the run's first random numbers.
    Raises MissingInput, UsageError, or WeightsError where the files do not belong together.
    """
    init, generation = find_init(config), generation_of(config.model)
    checkpoint = read_checkpoint(init) if init else None
    if checkpoint:  # first, since the vision model and the tokenizer of its own generation would be refused
        check_base(checkpoint.path, checkpoint.config, config.model)
    data = config.data
    tower, tokenizer = read_companions(config.vision_model, data.tokenizer, data.layout, generation, init, say)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UsageError(
            f"the tokenizer in {data.tokenizer} has {tokenizer.vocab_size} tokens, but the model has only "
            f"{config.model.vocab_size}: {tokenizer.last_token!r} would have no embedding — they do not "
            f"belong together (--preset, --tokenizer, --set model.vocab_size={tokenizer.vocab_size})"
        )
    model = VLM(config.model, tower.spec, tokenizer.placeholder_id, build_encoder(tower), config.projector)
    if checkpoint is None:
        return model, tokenizer, Receipt("random weights", new=[name for name, _ in model.named_parameters()])
    text_only = config.stage == "pretrain" or generation.stages[config.stage].start == "lm"  # its projector is new
    return model, tokenizer, load_into(model, checkpoint, new_projector=text_only)


def read_model_parts(
    weights: Path | None,
    vision_model: Path | None = None,
    tokenizer: Path | None = None,
    say: Callable[[str], None] = silent,
    new_projector: bool = False,
) -> ModelParts:
    """Find and read weights (None: those of the latest stage in the standard folder), vision tower and tokenizer.

    `find_companions` finds the last two where they are not named. `say` gets a line about each choice that is not
    obvious. Raises MissingInput, or WeightsError where a file is damaged or the files do not belong together; a
    text-only base is refused without `new_projector`.
    """
    checkpoint = read_checkpoint(weights or latest_model(say))
    paths = find_companions(checkpoint, vision_model, tokenizer, say)
    layout, generation = checkpoint.companions.layout, checkpoint.generation
    companions = read_companions(paths.vision_model, paths.tokenizer, layout, generation, checkpoint.path, say)
    stored = ModelParts(checkpoint, *companions)
    _check_companions(stored, paths, say)
    shapes = published_shapes(checkpoint.config)
    shapes |= projector_shapes(stored.tower.spec, checkpoint.config.hidden_size, stored.config.projector)
    # Before memory is taken.
    match_tensors(checkpoint, shapes, stored.config.text, stored.config.projector, new_projector)
    return stored


def check_whole(checkpoint: Checkpoint) -> None:
    """Raise WeightsError, as `load` does, where tensors are missing, unexpected or of another shape.

    A text-only base is whole without a projector.
    """
    config, tensors, spec = checkpoint.config, checkpoint.tensors, checkpoint.vision
    shapes, kind = published_shapes(config), checkpoint.projector or checkpoint.generation.projector
    if spec is None and checkpoint.projector in (LINEAR, MLP) and checkpoint.vision_width:
        spec = VisionSpec(224, 16, checkpoint.vision_width)  # their shapes depend on the width alone
    if spec and kind in PROJECTORS:
        shapes |= projector_shapes(spec, config.hidden_size, kind)
    elif checkpoint.projector:
        shapes |= {name: tensor.shape for name, tensor in tensors.items() if name.startswith(PREFIX)}
    match_tensors(checkpoint, shapes, config, kind)


def read_companions(
    vision_model: Path,
    tokenizer: Path,
    layout: str | None,
    generation: Generation,
    weights: Path | None,
    say: Callable[[str], None],
) -> tuple[StoredTower, Tokenizer]:
    """The vision tower and the tokenizer in these folders, or GGUF files; no `layout`: that of the tokenizer.

    Raises MissingInput or WeightsError, also for those of another generation than the weights or the run.
    """
    if is_gguf(vision_model):
        tower = gguf.read_vision_tower(vision_model)
        check_tower(vision_model, tower.spec, generation, weights)
    else:
        tower = read_tower(vision_model, open_spec(vision_model, generation, weights))
        if read_preprocessing(vision_model) is None:
            spec = tower.spec
            mean, deviation = (", ".join(f"{value:.3g}" for value in colours) for colours in (spec.mean, spec.std))
            say(f"{vision_model} has no preprocessor_config.json: images are resized {spec.resample}, and normalised "
                f"with mean {mean} and deviation {deviation}")  # fmt: skip
    if not is_gguf(tokenizer):
        return tower, open_tokenizer(tokenizer, layout, generation, weights)
    loaded = gguf.read_tokenizer(tokenizer)
    check_tokenizer(loaded, tokenizer, generation, weights)
    return tower, loaded


# --- the vision model and the tokenizer of some weights ---------------------------------------------------------------


@dataclass(frozen=True)
class CompanionKind:
    """A vision model or a tokenizer: its name, its file, its download and its option."""

    name: str
    file: str  # a folder with this file is one
    what: str  # to download
    option: str
    standard: Callable[[Generation], Path]  # the standard folder

    def is_at(self, path: Path) -> bool:
        return (path / self.file).is_file() or is_gguf(path)


VISION = CompanionKind("vision model", "config.json", "clip", "--vision-model", attrgetter("vision_model"))
TOKENIZER = CompanionKind("tokenizer", "tokenizer.json", "tokenizer", "--tokenizer", attrgetter("tokenizer"))


@dataclass(frozen=True)
class CompanionPaths:
    """The paths of the vision model and the tokenizer of some weights, and which of them the user named."""

    vision_model: Path
    tokenizer: Path
    named: frozenset[CompanionKind]


def find_companions(
    checkpoint: Checkpoint, vision_model: Path | None, tokenizer: Path | None, say: Callable[[str], None] = silent
) -> CompanionPaths:
    """Find both: as named, else in the folder of the weights, else at the paths of their run, else in standard folders.

    The standard folders of the project that contains the weights come before those of the working folder.
    Raises one MissingInput for all that is missing.
    """
    weights, companions, generation = checkpoint.path, checkpoint.companions, checkpoint.generation
    if companions.ignored:
        say(companions.ignored)
    has_vision = is_gguf(weights) or (weights.is_dir() and is_export(weights))
    has_tokenizer = is_gguf(weights) or TOKENIZER.is_at(weights)
    paths = CompanionPaths(
        vision_model or (weights if has_vision else _find(VISION, generation, weights, companions.vision_model, say)),
        tokenizer or (weights if has_tokenizer else _find(TOKENIZER, generation, weights, companions.tokenizer, say)),
        frozenset(kind for kind, path in ((VISION, vision_model), (TOKENIZER, tokenizer)) if path),
    )
    pairs = ((VISION, paths.vision_model, companions.vision_model), (TOKENIZER, paths.tokenizer, companions.tokenizer))
    if missing := [
        _missing(kind, path, None if kind in paths.named else companion, generation)
        for kind, path, companion in pairs
        if not kind.is_at(path)
    ]:
        raise MissingInput(*missing)
    return paths


def _find(
    kind: CompanionKind,
    generation: Generation,
    weights: Path,
    companion: Companion | None,
    say: Callable[[str], None],
) -> Path:
    """The first path where the companion is, else the standard folder."""
    if companion and (path := next(filter(kind.is_at, companion.paths), None)):
        return path
    standard = kind.standard(generation)
    out = weights.parent.resolve()
    if out.name == OUT_DIR.name and kind.is_at(out.parent / standard):  # the standard folder of the weights' project
        standard = tidy(out.parent / standard)
    if companion and companion.digest is None and kind.is_at(standard):  # otherwise `_check_companions` compares
        say(f"the run's {kind.name} is no longer in {companion.paths[-1]}: using {standard} instead")
    return standard


def _missing(kind: CompanionKind, path: Path, companion: Companion | None, generation: Generation) -> str:
    if companion is None:
        get = how_to_get(kind.what, path, generation.preset)
        return f"no {kind.name} in {path} ({kind.file} is missing) — {get}"
    return f"the run's {kind.name} is no longer in {companion.paths[-1]} — give its folder with {kind.option}"


def _check_companions(stored: ModelParts, paths: CompanionPaths, say: Callable[[str], None]) -> None:
    """Raises WeightsError where weights, tokenizer and vision model do not belong together.

    Where the user named one of the right size that is not the run's, this is only reported.
    """
    checkpoint, tower, tokenizer = stored.checkpoint, stored.tower, stored.tokenizer
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise WeightsError(
            f"{checkpoint.path} has {checkpoint.config.vocab_size} tokens, the tokenizer in {paths.tokenizer} "
            f"has {tokenizer.vocab_size}: {tokenizer.last_token!r} has no embedding — give the matching tokenizer "
            f"(--tokenizer), or train with --set model.vocab_size={tokenizer.vocab_size}"
        )
    width = checkpoint.vision_width
    if width is not None and width != tower.spec.width:
        raise WeightsError(
            f"{checkpoint.path} was trained with features of width {width}, the vision model in {paths.vision_model} "
            f"yields width {tower.spec.width} — give the matching folder with --vision-model"
        )
    for kind, companion, path, digest in (
        (VISION, checkpoint.companions.vision_model, paths.vision_model, vision_digest(tower.spec, tower.tensors)),
        (TOKENIZER, checkpoint.companions.tokenizer, paths.tokenizer, tokenizer_digest(tokenizer)),
    ):
        if companion is None or companion.digest in (None, digest):
            continue
        trouble = f"{checkpoint.path} was trained with a different {kind.name} than {path}"
        if kind not in paths.named:
            raise WeightsError(f"{trouble} — give the matching folder with {kind.option}")
        say(trouble)
