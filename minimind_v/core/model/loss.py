"""Next-token loss, computed only where a token is supervised."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a label that is not supervised, as in torch's own cross_entropy


def supervised(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions whose next token is supervised, [S] in the flattened batch in reading order; and these tokens [S].

    labels [B, T].
    """
    positions = F.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten().nonzero()[:, 0]
    return positions, labels.flatten()[positions + 1]


def supervised_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of the supervised tokens, and for each [S] whether it was the likeliest one.

    logits [S, V] at the positions of `supervised`, targets [S], the ids that follow them; IGNORE in their place counts
    for nothing. No [B, T, V] tensor ever exists: in a caption row of 640 positions some 40 are supervised.
    """
    logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="sum"), logits.detach().argmax(-1) == targets
