"""The held-out loss: nats per supervised token, and the perplexity."""

from __future__ import annotations

import math
from typing import Any

from minimind_v.core.evaluate.forward import BatchLosses
from minimind_v.core.evaluate.tasks.task import Task


class Loss(Task):
    """The mean over all supervised tokens of all rows."""

    name = "loss"

    def __init__(self, end_id: int) -> None:
        super().__init__(end_id)
        self.loss_sum, self.supervised_tokens = 0.0, 0

    def add(self, losses: BatchLosses) -> None:
        self.loss_sum += float(losses.loss_sum)
        self.supervised_tokens += len(losses.correct)

    def metrics(self) -> dict[str, Any]:
        loss = self.loss_sum / max(self.supervised_tokens, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}
