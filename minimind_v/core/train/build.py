"""What a run is assembled from: rows in their order, held-out rows, the model with its weights, its feature cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimind_v.core.config.schema import RunConfig, VisionSpec
from minimind_v.core.data.dataset import RowDataset
from minimind_v.core.data.feature_cache import FeatureCache, FeatureEncoder, open_feature_cache
from minimind_v.core.data.loader import BatchPlan
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.token_store import keep_tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.formats.companions import Companion, Companions, tokenizer_digest, vision_digest
from minimind_v.core.model.vlm import VLM
from minimind_v.core.monitor.metrics import Listener
from minimind_v.core.rows.heldout import hold_out
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.distributed import World


@dataclass(frozen=True)
class Data:
    """The rows of a run: its steps and its held-out rows."""

    plan: BatchPlan
    held_out: BatchPlan | None


def companions_of(config: RunConfig, model: VLM, tokenizer: Tokenizer) -> Companions:
    """The record of a run's vision model and tokenizer, for its weights."""
    encoder = model.vision_encoder
    assert encoder is not None
    return Companions(
        vision_model=Companion((config.vision_model,), vision_digest(encoder.spec, encoder.tower.state_dict())),
        tokenizer=Companion((config.data.tokenizer,), tokenizer_digest(tokenizer)),
        layout=config.data.layout,
    )


def open_data(
    config: RunConfig,
    spec: VisionSpec,
    tokenizer: Tokenizer,
    origin: Mapping[str, Any],
    folder: Path,
    world: World,
    listener: Listener,
) -> Data:
    """Open the rows of a run; the choice of held-out rows is kept in `folder`.

    `spec` is that of the model, `origin` that of the run, with its rows per step. Raises MissingInput or DataError.
    """
    data = config.data
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
        held_out = BatchPlan(plain.for_evaluation(), data.batch_size, keep=mask, tokens=kept, **common)
        train_rows = ~mask
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
    return Data(plan, held_out)


def _hold_out(
    config: RunConfig, dataset: RowDataset, origin: Mapping[str, Any], folder: Path, listener: Listener
) -> np.ndarray:
    inputs = json.dumps([origin[key] for key in ("data.file", "data.split", "data.images")])
    return hold_out(dataset.rows, config.val_rows, config.seed, folder / "held_out.json", inputs, listener.message)


def open_features(config: RunConfig, model: VLM, data: Data, listener: Listener) -> FeatureCache:
    """The features of the run's images: computed by the model's encoder on its device, cached if that is faster."""
    if model.vision_encoder is None:  # features are given
        return FeatureCache()
    folder = config.features_dir or config.out / "features"
    encoder = FeatureEncoder(model.vision_encoder, model.device, config.dtype)
    # On a CPU the readers would take their time from the encoder.
    readers = max(1, config.data.workers) if model.device.type == "cuda" else 1
    report = listener.message, listener.warning
    cache = open_feature_cache(config.features, folder, encoder, data.plan.rows, *report, readers)
    for plan in filter(None, (data.plan, data.held_out)):
        plan.dataset.remembered = cache.store
    return cache
