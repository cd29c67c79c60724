"""Check the inputs of a command before anything is loaded. One error names every missing file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from minimind_v.core.config.generation import V2025, V2026, generation_of
from minimind_v.core.config.presets import PRESETS, name_preset, weights_name
from minimind_v.core.config.recipes import NO_INIT
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.config.settings import is_settings, read_settings
from minimind_v.core.data.tokenizer import find_tokenizer
from minimind_v.core.errors import MissingInput, MmvError, open_all
from minimind_v.core.formats.generations import open_spec, open_tokenizer
from minimind_v.core.formats.inventory import preset_at
from minimind_v.core.hub.sources import how_to_get, how_to_pretrain, latest_model, weights_at
from minimind_v.core.model.vision.spec import read_tower_config
from minimind_v.core.paths import OUT_DIR, STANDARD_PRESET
from minimind_v.core.rows.pictures import find_pictures
from minimind_v.core.rows.stores import find_rows


def find_inputs(config: RunConfig) -> None:
    """Raises one MissingInput for all missing inputs of a run, WeightsError for a mix of generations, or UsageError."""
    config.check_evaluation()
    generation, init, preset = generation_of(config.model), config.init, name_preset(config.model)
    weights = weights_at(init) if init and init != NO_INIT and init.exists() else None
    try:
        open_all(
            lambda: open_spec(config.vision_model, generation, weights, preset=preset),
            lambda: open_tokenizer(config.data.tokenizer, config.data.layout, generation, weights, preset),
            lambda: find_rows(config.data.file),
            lambda: find_pictures(config.data.images),
            lambda: find_init(config),
            lambda: find_rows(config.eval_data) if config.eval_data else None,
            lambda: find_pictures(config.eval_images),
            lambda: read_settings(Path(config.eval_task or "")) if is_settings(config.eval_task or "") else None,
        )
    except MmvError:
        _check_generation(config)  # weights of the other generation are reported before their vision model
        raise


def _check_generation(config: RunConfig) -> None:
    """Raises WeightsError where the weights to start from belong to the other generation."""
    with suppress(MissingInput):  # the caller reports it
        if init := find_init(config):
            from minimind_v.core.formats.checkpoint import read_checkpoint  # torch: only for weights that exist
            from minimind_v.core.formats.generations import check_base

            check_base(init, read_checkpoint(init).config, config.model)


def find_init(config: RunConfig) -> Path | None:
    """The weights that a run starts from; None for random weights. Raises MissingInput with the command to get them."""
    if config.init is None or config.init == NO_INIT:
        return None
    try:
        return weights_at(config.init)
    except MissingInput as error:
        missing, size = str(error), name_preset(config.model) or generation_of(config.model).preset
        from_base = config.stage == "pretrain" or config.init.name == weights_name("lm", config.model)
        step = how_to_get("lm", config.init.parent, size) if from_base else f"run `{how_to_pretrain(size)}`"
        if near := weights_of_other_size(config):
            missing = f"no weights at {config.init}"
            step = f"for {near} add --preset {preset_at(near)}; for preset {size} {step}"
        raise MissingInput(f"{missing} to start from — {step}, or name a file with --init") from None


def weights_of_other_size(config: RunConfig) -> Path | None:
    """The weights of another preset where those that a run of the standard one starts from are missing."""
    if config.init is None or config.init.exists() or name_preset(config.model) != STANDARD_PRESET:
        return None
    stages = [stage for stage in ("lm", "pretrain", "sft") if config.init.name == weights_name(stage, config.model)]
    names = {weights_name(stage, model) for stage in stages for model in PRESETS.values()}
    return next((path for path in map(config.init.with_name, sorted(names)) if path.is_file()), None)


def find_model(
    weights: Path | None,
    vision_model: Path | None,
    tokenizer: Path | None,
    say: Callable[[str], None],
    out: Path = OUT_DIR,
) -> Path:
    """The named weights, else the latest in `out`, else the demo's.

    Raises MissingInput where there are none; it also names a missing vision model and tokenizer, the standard ones only
    where no weights are named: weights may name their own, so those are checked when the weights are read.
    """
    try:
        return weights_at(weights) if weights else latest_model(say, out)
    except MissingInput:
        present = (other for other in (V2025, V2026) if (other.tokenizer / "tokenizer.json").is_file())
        generation = next(present, V2025)  # that of the weights is not known
        if weights is None:
            vision_model, tokenizer = vision_model or generation.vision_model, tokenizer or generation.tokenizer
        open_all(
            lambda: weights_at(weights) if weights else latest_model(say, out),
            lambda: read_tower_config(vision_model, preset=generation.preset) if vision_model else None,
            lambda: find_tokenizer(tokenizer, generation.preset) if tokenizer else None,
        )
        raise
