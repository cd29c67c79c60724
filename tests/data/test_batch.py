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
    place = torch.arange(wide)
    rows = torch.arange(1, len(lengths) + 1)[:, None]
    attention_mask = place < torch.tensor(lengths)[:, None]
    image_mask = place < torch.tensor(pictures)[:, None] * PATCHES
    input_ids = torch.where(attention_mask, rows * 100 + place, 0)
    labels = torch.where(attention_mask & ~image_mask, input_ids, IGNORE)
    features = torch.arange(sum(pictures))[:, None, None].expand(-1, PATCHES, 5).float()
    return Batch(input_ids, attention_mask, labels, image_mask, image_features=features if sum(pictures) else None)


@pytest.mark.parametrize("positions", [1, 8, 10, 24, 36, 1000])
@pytest.mark.parametrize("pictures", [PICTURES, [0] * 6], ids=["pictures", "text"])
def test_parts(positions, pictures):
    whole = batch_of(LENGTHS, pictures)
    parts = whole.split(positions)
    assert torch.equal(
        torch.cat([part.input_ids[part.attention_mask] for part in parts]), whole.input_ids[whole.attention_mask]
    )
    assert torch.equal(
        torch.cat([part.labels[part.attention_mask] for part in parts]), whole.labels[whole.attention_mask]
    )
    assert sum(part.supervised for part in parts) == whole.supervised
    for part in parts:
        assert part.input_ids.shape[1] == part.attention_mask.sum(dim=1).max()
        assert part.input_ids.numel() <= positions or len(part) == 1
        found = 0 if part.image_features is None else len(part.image_features)
        assert int(part.image_mask.sum()) == found * PATCHES
    if whole.image_features is not None:
        assert torch.equal(torch.cat([part.image_features for part in parts]), whole.image_features)
    assert (len(parts) == 1) == (positions == 1000), "as few as may be"
    assert (len(parts) == 6) == (positions == 1)


def test_parts_are_of_about_as_many_rows():
    """A last one of a single row takes longer than its share."""
    whole = batch_of([7] * 16, [0] * 16)
    assert [len(part) for part in whole.split(5 * 7)] == [4, 4, 4, 4]
    whole = batch_of([2, 2, 2, 9, 9], [0] * 5)
    assert [len(part) for part in whole.split(18)] == [3, 2], "but no part is too large"
