"""A batch in parts holds the same rows and pictures, each part no wider than its longest row."""

from __future__ import annotations

import pytest
import torch

from minimind_v.core.data.batch import Batch
from minimind_v.core.model.loss import IGNORE

PATCHES = 2
LENGTHS = [3, 9, 4, 4, 12, 2]
PICTURES = [1, 2, 0, 1, 3, 0]


def batch_of(lengths, pictures) -> Batch:
    wide = max(lengths)
    columns = torch.arange(wide)
    rows = torch.arange(1, len(lengths) + 1)[:, None]
    attention_mask = columns < torch.tensor(lengths)[:, None]
    image_mask = columns < torch.tensor(pictures)[:, None] * PATCHES
    input_ids = torch.where(attention_mask, rows * 100 + columns, 0)
    labels = torch.where(attention_mask & ~image_mask, input_ids, IGNORE)
    features = torch.arange(sum(pictures))[:, None, None].expand(-1, PATCHES, 5).float()
    return Batch(input_ids, attention_mask, labels, image_mask, image_features=features if sum(pictures) else None)


@pytest.mark.parametrize("positions", [1, 8, 10, 24, 36, 1000])
@pytest.mark.parametrize("pictures", [PICTURES, [0] * 6], ids=["pictures", "text"])
def test_a_split_keeps_every_row_and_fits_the_limit(positions, pictures):
    whole = batch_of(LENGTHS, pictures)
    pieces = whole.split(positions)
    assert torch.equal(
        torch.cat([piece.input_ids[piece.attention_mask] for piece in pieces]), whole.input_ids[whole.attention_mask]
    )
    assert torch.equal(
        torch.cat([piece.labels[piece.attention_mask] for piece in pieces]), whole.labels[whole.attention_mask]
    )
    assert sum(piece.supervised for piece in pieces) == whole.supervised
    for piece in pieces:
        assert piece.input_ids.shape[1] == piece.attention_mask.sum(dim=1).max()
        assert piece.input_ids.numel() <= positions or len(piece) == 1
        image_count = 0 if piece.image_features is None else len(piece.image_features)
        assert int(piece.image_mask.sum()) == image_count * PATCHES
    if whole.image_features is not None:
        assert torch.equal(torch.cat([piece.image_features for piece in pieces]), whole.image_features)
    assert (len(pieces) == 1) == (positions == 1000), "as few as may be"
    assert (len(pieces) == 6) == (positions == 1)


def test_a_split_makes_micro_batches_of_similar_size():
    """A last one of a single row takes longer than its share."""
    whole = batch_of([7] * 16, [0] * 16)
    assert [len(piece) for piece in whole.split(5 * 7)] == [4, 4, 4, 4]
    whole = batch_of([2, 2, 2, 9, 9], [0] * 5)
    assert [len(piece) for piece in whole.split(18)] == [3, 2], "but no part is too large"
