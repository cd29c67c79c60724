"""The loss over supervised positions alone is the loss over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minimind_v.core.model.loss import IGNORE, supervised, supervised_loss


def labels_of(input_ids, loss_mask):
    return torch.where(loss_mask.bool(), input_ids, IGNORE)


def full_loss(hidden, labels, head):
    """All logits, shifted by one, and torch's own masking."""
    logits = hidden @ head.T  # [B, T, V]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def loss_of(hidden, labels, head):
    """As the model asks for it: only the hidden states that are read are there."""
    positions, targets = supervised(labels)
    return supervised_loss(hidden.flatten(0, 1)[positions] @ head.T, targets)


@pytest.fixture
def sample():
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 21, 8, requires_grad=True), torch.randn(29, 8, requires_grad=True)
    input_ids = torch.randint(0, 29, (3, 21))
    loss_mask = torch.rand(3, 21) < 0.3
    loss_mask[:, 0] = True  # nothing can predict a row's first token, supervised or not
    loss_mask[1] = False  # a row without an answer
    return hidden, labels_of(input_ids, loss_mask), head


def test_equals_full_logits(sample):
    hidden, labels, head = sample
    loss, _ = loss_of(hidden, labels, head)
    expected = full_loss(hidden, labels, head)
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, (hidden, head))
    theirs = torch.autograd.grad(expected, (hidden, head))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_correct_tokens_in_reading_order(sample):
    hidden, labels, head = sample
    with torch.no_grad():  # make every second supervised token a sure hit
        positions = (labels[:, 1:] != IGNORE).nonzero().tolist()
        for row, at in positions[::2]:
            hidden[row, at] = head[labels[row, at + 1]] * 10
        _, correct = loss_of(hidden, labels, head)
        best = (hidden @ head.T).argmax(dim=-1)
    assert correct.tolist() == [int(best[row, at]) == int(labels[row, at + 1]) for row, at in positions]
    assert len(correct) == len(positions)
    assert any(correct.tolist())
    assert not all(correct.tolist())


def test_no_supervised_token(sample):
    hidden, labels, head = sample
    loss, correct = loss_of(hidden, torch.full_like(labels, IGNORE), head)
    assert loss.item() == 0
    assert len(correct) == 0
    loss.backward()
    assert not hidden.grad.any()


@pytest.mark.parametrize("use_moe", [False, True])
def test_model_loss_equals_its_own_logits(use_moe, make_vlm):
    """Through the whole model, and whatever padding there is."""
    model = make_vlm(use_moe=use_moe).train()
    input_ids, mask = torch.randint(0, 61, (2, 14)), torch.arange(14) < torch.tensor([[14], [9]])
    labels = labels_of(input_ids, mask & (torch.rand(2, 14) < 0.5))
    out = model(input_ids, attention_mask=mask, labels=labels)
    logits = model(input_ids, attention_mask=mask).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    assert (out.loss - out.aux_loss).item() == pytest.approx(expected.item(), rel=1e-5)
    assert (out.aux_loss.item() > 0) == use_moe
    wider = model(
        F.pad(input_ids, (0, 20), value=3),
        attention_mask=F.pad(mask, (0, 20)),
        labels=F.pad(labels, (0, 20), value=IGNORE),
    )
    assert wider.loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
