"""Evaluate a model on held-out rows: one forward pass gives the loss and the share of exact short answers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minimind_v.core.data.dataset import BrokenRow, RowDataset
from minimind_v.core.data.feature_cache import FeatureCache, FeatureEncoder, open_feature_cache
from minimind_v.core.data.loader import BatchPlan, load_batches
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import DataError
from minimind_v.core.evaluate.ask import perplexity
from minimind_v.core.evaluate.forward import Answer, BatchLosses, batch_losses
from minimind_v.core.model.vlm import VLM
from minimind_v.core.rows.row import RowStore

SHORT = 12  # tokens, the end token included: longer answers are not judged


@dataclass
class Scores:
    """The results of an evaluation."""

    rows: int = 0
    supervised_tokens: int = 0
    loss_sum: float = 0.0  # nats, of all supervised tokens
    answers: dict[str, list[bool | None]] = field(
        default_factory=dict
    )  # per row: whether each is exact; None: not judged
    seconds: float = 0.0
    broken: list[BrokenRow] = field(default_factory=list)
    text_rows: int = 0  # of the rows, those with images that no mark shows
    notes: Counter[str] = field(default_factory=Counter)  # of the rows, those read in another way than they are written

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.loss_sum / max(self.supervised_tokens, 1)

    @property
    def perplexity(self) -> float:
        return float(perplexity(self.loss))

    @property
    def _judged(self) -> list[bool]:
        return [score for row in self.answers.values() for score in row if score is not None]

    @property
    def short_answers(self) -> int:
        return len(self._judged)

    @property
    def accuracy(self) -> float | None:
        """Share of the short answers that are exactly correct; None where there are none."""
        judged = self._judged
        return sum(judged) / len(judged) if judged else None

    def add(self, losses: BatchLosses, end_id: int) -> None:
        """Score the answers of a batch."""
        self.loss_sum += float(losses.loss_sum)
        self.supervised_tokens += len(losses.correct)
        for row in losses.batch.locations:
            self.answers[row] = []
        for answer in losses.answers(end_id):
            self.answers[losses.batch.locations[answer.row]].append(_is_exact(answer))


def _is_exact(answer: Answer) -> bool | None:
    """Whether every token of a short answer, and its end, is the likeliest; None for a long or cut one."""
    return bool(answer.correct.all()) if answer.ended and len(answer.labels) <= SHORT else None


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
) -> Scores:
    """Score every answer of every row, given the true turns before it, in the precision of training.

    Each answer follows what a prompt of chat ends with: in the layout of minimind-3v an empty think block, or the
    beginning of a block where the true answer has reasoning.

    `memory` has features of images that were encoded before; without it each image is encoded here. Raises DataError
    where no row can be scored.
    """
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
            scores.add(losses, eos_id)
            scores.rows += len(batch)
            scores.text_rows += batch.text_rows
            scores.notes += Counter(batch.notes)
        progress(number, len(plan))
    if not scores.supervised_tokens:
        trouble = f"; the first problem: {scores.broken[0]}" if scores.broken else ""
        raise DataError(f"{dataset.rows.path}: no row could be evaluated{trouble}")
    scores.seconds = time.perf_counter() - started
    return scores
