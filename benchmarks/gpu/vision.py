"""The vision encoder beside training: how images are grouped, recorded and stored, each lever on and off."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.card import Card, Result, close
from benchmarks.gpu.runs import StepListener, configure, make_run
from benchmarks.gpu.training import measure
from minimind_v.core.cuda_graph import Record, record_cuda
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureCache, FeatureEncoder
from minimind_v.core.data.feature_layout import FeatureLayout
from minimind_v.core.data.feature_store import FeatureStore, measure_reading
from minimind_v.core.data.feature_writer import FeatureWriter
from minimind_v.core.data.vision_stage import VisionStage
from minimind_v.core.train import loop

STEPS = {"pretrain": 16, "sft": 4}  # images of a step
GROUPS = (16, 32, 64)


def vision(card: Card, result: Result) -> None:
    """Images per second by each way of encoding and storing them; then first epochs without the stage."""
    run = make_run(configure(card, "small", "pretrain"), StepListener())
    encoder = run.train_step.features.encoder
    assert encoder is not None
    for stage, images in STEPS.items():
        _grouping(card, result, encoder, stage, 2 if card.tiny else images)
    _storing(card, result, encoder)
    del run
    for stage, features in product(("pretrain",) if card.tiny else STEPS, ("off", "store")):  # as `training` has them
        name = f"small {stage}, {'pictures encoded' if features == 'off' else 'encoded and stored'}"
        result[f"{name}, at their step"] = line = {}
        folder = card.folder / "features" / f"of-{stage}"  # where none are stored yet
        with mock.patch.object(loop, "encode_ahead", lambda steps, _: steps):
            measure(card, line, "small", stage, features, {"features_dir": folder})


def _grouping(card: Card, result: Result, encoder: FeatureEncoder, stage: str, images: int) -> None:
    """Images that are encoded when their step begins, and ahead in groups, kernel by kernel or as a graph."""
    steps, checks = _steps(card, encoder, images), result.setdefault("checks", {})
    cache = FeatureCache(encoder, warn=str)
    expected = torch.cat(_at_their_step(steps, cache))
    result[f"{stage}, at their step"] = _rate(card, steps, lambda: _at_their_step(steps, cache))
    usual = encoder.group
    for encoder.group in (4,) if card.tiny else GROUPS:
        name, eager = f"{stage}, groups of {encoder.group}", VisionStage(cache, encoder)
        eager.graphs.on = False
        rows = torch.cat(_ahead(steps, eager))
        result[f"{name}, eager"] = _rate(card, steps, lambda ahead=eager: _ahead(steps, ahead))
        graph = VisionStage(cache, encoder, _recorder(card))
        _ahead(steps, graph)
        result[f"{name}, graph"] = _rate(card, steps, lambda ahead=graph: _ahead(steps, ahead))
        checks[f"{name}: the rows of each step"] = close(rows, expected) < 2e-2
        checks[f"{name}: recorded"] = graph.graphs.recorded == 1
        checks[f"{name}: the graph's bits"] = torch.equal(torch.cat(_ahead(steps, graph)), rows)
    encoder.group = usual


def _storing(card: Card, result: Result, encoder: FeatureEncoder) -> None:
    """What a disk costs: features that are written in their turn or by a thread, and read by some workers."""
    spec = encoder.encoder.spec
    layout = FeatureLayout(encoder.kind, spec.tokens_per_image, spec.width)
    steps = _steps(card, encoder, 2 if card.tiny else STEPS["pretrain"])
    for name, threaded in (("in their turn", False), ("by a thread", True)):
        store = FeatureStore(card.folder / "features" / f"vision-{threaded}", layout, 1 << 40)
        cache = FeatureCache(encoder, store)
        cache.writer = FeatureWriter(store, print, threaded)
        ahead = VisionStage(cache, encoder, _recorder(card))

        def work(ahead=ahead, cache=cache) -> None:
            fresh = [replace(step, keys=[os.urandom(16) for _ in step.keys]) for step in steps]
            _ahead(fresh, ahead)
            cache.flush()

        result[f"stored {name}"] = _rate(card, steps, work)
    for readers in (1, 4, 12):
        seconds = measure_reading(card.folder / "features", layout.record, readers)
        result[f"read by {readers}"] = {"images_s": round(1 / seconds, 1)} if seconds else "no disk space"
    result["time of an image for auto"] = {"ms": round(encoder.identify()[1] * 1e3, 4)}


def _steps(card: Card, encoder: FeatureEncoder, images: int) -> list[Batch]:
    """Batches as a data worker gives them, with a whole number of the largest groups."""
    size, draw = encoder.encoder.spec.image_size, torch.Generator().manual_seed(0)
    ids, steps = torch.zeros(1, 2, dtype=torch.int64), []
    for _ in range((8 if card.tiny else 512) // images):
        pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=draw)
        batch = Batch(ids, ids == 0, ids, ids > 0, pixels, keys=[bytes(16)] * images)
        steps.append(batch.pin_memory() if card.cuda else batch)
    return steps


def _at_their_step(steps: list[Batch], cache: FeatureCache) -> list[Tensor]:
    """Features of each step, encoded when it begins."""
    features = [cache.features(step.to(cache.encoder.device)) for step in steps]
    return [each for each in features if each is not None]


def _ahead(steps: list[Batch], stage: VisionStage) -> list[Tensor]:
    """Features of each step, encoded ahead."""
    return [batch.image_features for batches in stage.steps([batch] for batch in steps) for batch in batches]


def _recorder(card: Card) -> Record:
    """CUDA's own; on a CPU, which stands in, the work stays as it is."""
    return record_cuda if card.cuda else lambda encode, device, pool: encode


def _rate(card: Card, steps: list[Batch], work: Callable[[], object]) -> Result:
    images = sum(step.images for step in steps)
    seconds = card.seconds(work, 4, 1)
    return {"images_s": round(images / seconds, 1), "ms_a_step": round(seconds / len(steps) * 1e3, 3)}
