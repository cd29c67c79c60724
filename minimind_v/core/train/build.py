"""The parts of a run: rows in their order, held-out rows, the model with its weights, its feature cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimind_v.core.config.generation import generation_of
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.dataset import RowDataset
from minimind_v.core.data.feature_cache import FeatureCache, FeatureEncoder, open_feature_cache
from minimind_v.core.data.loader import BatchPlan
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.token_store import keep_tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError
from minimind_v.core.formats.checkpoint import load_into, read_checkpoint
from minimind_v.core.formats.companions import UNKNOWN, Companion, Companions, tokenizer_digest, vision_digest
from minimind_v.core.formats.inputs import find_init
from minimind_v.core.formats.load import read_companions
from minimind_v.core.formats.vision_tower import build_encoder
from minimind_v.core.model.projector import projected
from minimind_v.core.model.vision.encoder import VisionEncoder
from minimind_v.core.model.vlm import VLM
from minimind_v.core.monitor.metrics import Listener
from minimind_v.core.rows.heldout import hold_out
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.distributed import World


@dataclass(frozen=True)
class Data:
    """The inputs of a run: its steps and its held-out rows."""

    encoder: VisionEncoder
    tokenizer: Tokenizer
    plan: BatchPlan
    held_out: BatchPlan | None


@dataclass(frozen=True)
class Loaded:
    """The model at the start of a run."""

    model: VLM
    weights: bool  # whether they were loaded
    new_projector: bool
    companions: Companions = UNKNOWN  # its vision model and tokenizer


def open_data(config: RunConfig, origin: Mapping[str, Any], folder: Path, world: World, listener: Listener) -> Data:
    """Open all inputs; the choice of held-out rows is kept in `folder`.

    `origin` is that of the run, with its rows per step. Raises MissingInput, UsageError or DataError.
    """
    data = config.data
    tower, tokenizer = read_companions(
        config.vision_model, data.tokenizer, data.layout, generation_of(config.model), find_init(config),
        listener.message,
    )  # fmt: skip
    encoder = build_encoder(tower)
    spec = projected(tower.spec, config.projector)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UsageError(
            f"the tokenizer in {data.tokenizer} has {tokenizer.vocab_size} tokens, but the model has only "
            f"{config.model.vocab_size}: {tokenizer.last_token!r} would have no embedding — they do not "
            f"belong together (--preset, --tokenizer, --set model.vocab_size={tokenizer.vocab_size})"
        )
    prompts = PromptEncoder(tokenizer, spec.tokens_per_image)
    rows = open_rows(data.file, data.images, data.split, listener.message)
    plain = RowDataset.for_spec(rows, prompts, spec, data.max_length)
    dataset = plain.for_training(config.seed)
    tokens = keep_tokens(dataset, origin["data.file"], folder, listener.warning)
    common = {"pad_id": tokenizer.pad_id, "processes": world.size, "rank": world.rank}
    held_out, train_rows = None, None
    if config.val_every:
        mask = world.broadcast(_hold_out(config, dataset, origin, folder, listener) if world.leads else None)
        kept = tokens if plain is dataset else None  # else the tokens of a few hundred rows are not kept
        held_out, train_rows = BatchPlan(plain, data.batch_size, keep=mask, tokens=kept, **common), ~mask
    plan = BatchPlan(
        dataset,
        data.batch_size,
        seed=config.seed,
        epochs=config.epochs,
        rows_per_step=origin["rows_per_update"],
        keep=train_rows,
        tokens=tokens,
        **common,
    )
    return Data(encoder, tokenizer, plan, held_out)


def _hold_out(
    config: RunConfig, dataset: RowDataset, origin: Mapping[str, Any], folder: Path, listener: Listener
) -> np.ndarray:
    inputs = json.dumps([origin[key] for key in ("data.file", "data.split", "data.images")])
    return hold_out(dataset.rows, config.val_rows, config.seed, folder / "held_out.json", inputs, listener.message)


def build_model(config: RunConfig, data: Data, listener: Listener) -> Loaded:
    """The model with its initial weights. Raises MissingInput, with the command that makes them, or WeightsError."""
    model = VLM(config.model, data.encoder.spec, data.tokenizer.placeholder_id, data.encoder, config.projector)
    init = find_init(config)
    if init is None:
        listener.warning("starting from random weights: the language model is untrained")
        return Loaded(model, weights=False, new_projector=True, companions=_companions(config, data))
    checkpoint = read_checkpoint(init)
    receipt = load_into(model, checkpoint, new_projector=_may_lack_projector(config))
    listener.message(str(receipt))
    return Loaded(model, weights=True, new_projector=bool(receipt.new), companions=_companions(config, data))


def _may_lack_projector(config: RunConfig) -> bool:
    """Whether the run may start from a text-only base: where the published one does."""
    return config.stage == "pretrain" or generation_of(config.model).stages[config.stage].start == "lm"


def open_features(config: RunConfig, model: VLM, data: Data, listener: Listener) -> FeatureCache:
    """The features of the run's images: computed by the model's encoder on its device, cached if that is faster."""
    if model.vision_encoder is None:  # features are given
        return FeatureCache()
    folder = config.features_dir or config.out / "features"
    encoder = FeatureEncoder(model.vision_encoder, model.device, config.dtype)
    cache = open_feature_cache(config.features, folder, encoder, data.plan.rows, listener.message, listener.warning)
    for plan in filter(None, (data.plan, data.held_out)):
        plan.dataset.remembered = cache.store
    return cache


def _companions(config: RunConfig, data: Data) -> Companions:
    vision = vision_digest(data.encoder.spec, data.encoder.tower.state_dict())
    return Companions(
        vision_model=Companion((config.vision_model,), vision),
        tokenizer=Companion((config.data.tokenizer,), tokenizer_digest(data.tokenizer)),
        layout=config.data.layout,
    )
