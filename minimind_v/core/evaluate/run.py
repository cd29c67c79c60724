"""How good a model is on rows that it has not seen: the loss, and how many short answers are exactly right."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minimind_v.core.data.batch import Batch
from minimind_v.core.data.dataset import BrokenRow, RowDataset
from minimind_v.core.data.feature_cache import FeatureCache, FeatureEncoder
from minimind_v.core.data.loader import BatchPlan, load_batches
from minimind_v.core.device import autocast
from minimind_v.core.errors import DataError
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vlm import VLM

SHORT = 12  # tokens, `<|im_end|>` included: an answer up to this long is scored as right or wrong


@dataclass
class Scores:
    """What an evaluation found."""

    rows: int = 0
    supervised_tokens: int = 0
    loss: float = 0.0  # nats per supervised token
    short_answers: int = 0
    short_right: int = 0
    seconds: float = 0.0
    answers: dict[str, list[bool | None]] = field(default_factory=dict)  # per row: right or not; None where not short
    broken: list[BrokenRow] = field(default_factory=list)
    text_rows: int = 0  # of the rows, those with pictures that no mark shows
    notes: Counter[str] = field(default_factory=Counter)  # those that are read in another way than they are written

    @property
    def accuracy(self) -> float | None:
        """Share of the short answers that are right to the letter; None where there are none."""
        return self.short_right / self.short_answers if self.short_answers else None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 50.0))


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
    """Score every turn of every row, given the true turns before it, in the precision of training.

    `memory` has the features of pictures that were encoded before; without it each picture is encoded here.

    One forward pass does it all: a greedy answer equals the truth exactly where each of its tokens, and the end, is
    the likeliest one after the true tokens before it.
    """
    model.eval()
    started = time.perf_counter()
    plan = BatchPlan(dataset, batch_size, pad_id, limit=limit)
    scores = Scores()
    total_loss = 0.0
    if memory is None:
        memory = FeatureCache(
            FeatureEncoder(model.vision_encoder, model.device, dtype) if model.vision_encoder else None
        )
    dataset.remembered = memory.store
    for number, batch in enumerate(load_batches(plan, workers), 1):
        scores.broken += batch.broken
        if len(batch):
            moved = batch.to(model.device)
            features = memory.features(moved)
            with autocast(model.device, dtype):
                out = model(**moved.tokens, image_features=features)
            assert out.loss_sum is not None
            assert out.hits is not None
            total_loss += float(out.loss_sum)
            scores.rows += len(batch)
            scores.text_rows += batch.text_rows
            scores.notes += Counter(batch.notes)
            scores.supervised_tokens += len(out.hits)
            _score_answers(scores, batch, out.hits.cpu(), eos_id)
        progress(number, len(plan))
    if not scores.supervised_tokens:
        trouble = f"; the first trouble: {scores.broken[0]}" if scores.broken else ""
        raise DataError(f"{dataset.rows.path}: no row could be scored{trouble}")
    scores.loss = total_loss / scores.supervised_tokens
    scores.seconds = time.perf_counter() - started
    return scores


def _score_answers(scores: Scores, batch: Batch, hits: Tensor, eos_id: int) -> None:
    supervised = batch.labels[:, 1:] != IGNORE  # [B, T-1]
    right = torch.ones_like(supervised)
    right[supervised] = hits
    for row, place in enumerate(batch.places):
        answers: list[bool | None] = []
        at = supervised[row].nonzero().flatten()  # positions of the row's supervised tokens
        if len(at):
            breaks = (at.diff() > 1).nonzero().flatten() + 1
            for span in at.tensor_split(breaks):
                labels = batch.labels[row, span + 1]
                ends = (labels == eos_id).nonzero().flatten()
                if len(ends) == 0 or int(ends[-1]) + 1 > SHORT:  # cut, or long
                    answers.append(None)
                    continue
                answers.append(bool(right[row, span[: int(ends[-1]) + 1]].all()))
        scores.answers[place] = answers
        scores.short_answers += sum(answer is not None for answer in answers)
        scores.short_right += sum(answer is True for answer in answers)
