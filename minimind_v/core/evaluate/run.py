"""Evaluate a model on held-out rows: one forward pass over them, scored by tasks."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minimind_v.core.config.schema import one_of
from minimind_v.core.data.dataset import BrokenRow, RowDataset
from minimind_v.core.data.feature_cache import FeatureCache, FeatureEncoder, open_feature_cache
from minimind_v.core.data.loader import BatchPlan, load_batches
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import DataError
from minimind_v.core.evaluate.forward import batch_losses
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.evaluate.tasks.task import Task, TaskRows
from minimind_v.core.model.vlm import VLM
from minimind_v.core.rows.row import RowStore

USUAL = ("loss", "exact")  # the tasks of an evaluation that names none


@dataclass
class Scores:
    """The results of an evaluation."""

    rows: int = 0
    supervised_tokens: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)  # of all its tasks, by name
    answers: dict[str, list[float | None]] = field(default_factory=dict)  # per row: a score each; None: not judged
    seconds: float = 0.0
    broken: list[BrokenRow] = field(default_factory=list)
    text_rows: int = 0  # of the rows, those with images that no mark shows
    notes: Counter[str] = field(default_factory=Counter)  # of the rows, those read in another way than they are written

    @property
    def loss(self) -> float:
        """Nats per supervised token. Needs the task `loss`."""
        return float(self.metrics["loss"])

    @property
    def perplexity(self) -> float:
        return float(self.metrics["perplexity"])

    @property
    def short_answers(self) -> int:
        return int(self.metrics["short_answers"])

    @property
    def accuracy(self) -> float | None:
        """Share of the short answers that are exactly correct; None where there are none. Needs `exact`."""
        accuracy: float | None = self.metrics["accuracy"]
        return accuracy


def held_out_dataset(
    model: VLM, tokenizer: Tokenizer, rows: RowStore, max_length: int, blank: bool = False
) -> RowDataset:
    """Rows as the model reads them, in the layout of its tokenizer; `blank` gives a grey image in place of each."""
    spec = model.spec
    prompts = PromptEncoder(tokenizer, spec.tokens_per_image)
    return RowDataset.for_spec(rows, prompts, spec, max_length, blank)


def features_beside(
    model: VLM, weights: Path, dtype: str, rows: int, say: Callable[[str], None], warn: Callable[[str], None]
) -> FeatureCache | None:
    """The features that the run of these weights has left beside them, for an evaluation of `rows` rows; None: none."""
    folder = weights.parent / "features"
    if model.vision_encoder is None or not folder.is_dir():
        return None
    encoder = FeatureEncoder(model.vision_encoder, model.device, dtype)
    return open_feature_cache("exact", folder, encoder, rows, say, warn)


@torch.inference_mode()
def evaluate(
    model: VLM,
    dataset: RowDataset,
    pad_id: int,
    eos_id: int,
    batch_size: int = 16,
    workers: int = 1,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    dtype: str = "auto",
    memory: FeatureCache | None = None,
    task: str | None = None,
) -> Scores:
    """Score every answer of every row, given the true turns before it, in the precision of training.

    Each answer follows what a prompt of chat ends with: in the layout of minimind-3v an empty think block, or the
    beginning of a block where the true answer has reasoning.

    `task` is one of TASKS; without it the USUAL ones share one pass. `memory` has features of images that were encoded
    before; without it each image is encoded here. Raises UsageError for an unknown task, DataError where no row can be
    scored.
    """
    tasks = open_tasks(task, eos_id)
    if task is not None and type(tasks[0]).conversation is not Task.conversation:
        dataset = copy.copy(dataset)
        dataset.rows = TaskRows(dataset.rows, tasks[0], dataset.encoder)
    dataset = dataset.for_evaluation()
    model.eval()
    started = time.perf_counter()
    plan = BatchPlan(dataset, batch_size, pad_id, limit=limit)
    scores = Scores()
    if memory is None:
        encoder = model.vision_encoder
        memory = FeatureCache(FeatureEncoder(encoder, model.device, dtype) if encoder else None)
    dataset.remembered = memory.store
    for number, batch in enumerate(load_batches(plan, workers), 1):
        scores.broken += batch.broken
        if len(batch):
            moved = batch.to(model.device)
            losses = batch_losses(model, moved, memory.features(moved), dtype)
            for each in tasks:
                each.add(losses)
            scores.rows += len(batch)
            scores.text_rows += batch.text_rows
            scores.notes += Counter(batch.notes)
            scores.supervised_tokens += len(losses.correct)
        progress(number, len(plan))
    if not scores.supervised_tokens:
        trouble = f"; the first problem: {scores.broken[0]}" if scores.broken else ""
        raise DataError(f"{dataset.rows.path}: no row could be evaluated{trouble}")
    for each in tasks:
        scores.metrics |= each.metrics()
        scores.answers |= each.scores
    scores.seconds = time.perf_counter() - started
    return scores


def open_tasks(task: str | None, end_id: int) -> list[Task]:
    """The task of this name, or the usual ones; answers end with `end_id`. Raises UsageError."""
    if task is not None:
        one_of("task", task, TASKS)
    return [TASKS[name](end_id) for name in ([task] if task else USUAL)]
