"""The forward pass that evaluation and validation share: the losses of a batch, in the precision of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind_v.core.data.batch import Batch
from minimind_v.core.device import autocast
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vlm import VLM


@dataclass(frozen=True)
class Answer:
    """One supervised answer of a row, as the model predicts it after the true tokens before it."""

    row: int  # of the batch
    labels: Tensor  # [N], the true ids up to the end token
    correct: Tensor  # bool [N], whether the model's likeliest token is the true one
    ended: bool  # false: it was cut, and has no end token


@dataclass(frozen=True)
class BatchLosses:
    """The results of a forward pass over a batch."""

    batch: Batch
    loss_sum: Tensor  # nats, over all supervised tokens
    correct: Tensor  # bool [S], of each supervised token in reading order

    def answers(self, end_id: int) -> Iterator[Answer]:
        """The answers of every row in reading order, on the CPU; their tokens end with `end_id`."""
        labels = self.batch.labels[:, 1:].cpu()  # [B, T-1]
        supervised = labels != IGNORE
        correct = torch.ones_like(supervised)
        correct[supervised] = self.correct.cpu()
        for row in range(len(labels)):
            positions = supervised[row].nonzero().flatten()
            if not len(positions):
                continue
            breaks = (positions.diff() > 1).nonzero().flatten() + 1
            for span in positions.tensor_split(breaks):
                ends = (labels[row, span] == end_id).nonzero().flatten()
                if len(ends):
                    span = span[: int(ends[-1]) + 1]
                yield Answer(row, labels[row, span], correct[row, span], len(ends) > 0)


def batch_losses(model: VLM, batch: Batch, features: Tensor | None, dtype: str) -> BatchLosses:
    """Run a batch that is on the model's device, with the features of its images [M, P, width]."""
    with autocast(model.device, dtype):
        out = model(**batch.tokens, image_features=features)
    assert out.loss_sum is not None
    assert out.correct is not None
    return BatchLosses(batch, out.loss_sum, out.correct)
