"""Each freeze policy trains exactly what it says, and nothing trains the vision tower."""

from __future__ import annotations

import pytest
import torch

from minimind_v.core.config.freeze import FREEZE_POLICIES
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.train.freeze import freeze

TRAINS = {
    "projector": lambda name: False,
    "projector+last": lambda name: name.startswith("model.layers.2."),
    "projector+ends": lambda name: name.startswith(("model.layers.0.", "model.layers.2.")),
    "attention": lambda name: (
        name.startswith("model.") and any(f".self_attn.{letter}_proj." in name for letter in "qkvo")
    ),
    "all": lambda name: name.startswith(("model.", "lm_head.")),
}


def expected_names(model, policy):
    return {name for name, _ in model.named_parameters() if name.startswith("vision_proj.") or TRAINS[policy](name)}


def learn_once(model):
    """A batch with pictures and text, backwards."""
    torch.manual_seed(5)
    input_ids = torch.randint(6, 61, (3, 40))
    input_ids[:2, 1:5] = 5
    labels = torch.where(torch.rand(3, 40) < 0.5, input_ids, IGNORE)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    model.train()(input_ids, pixel_values=pixels, labels=labels).loss.backward()


def test_policies_are_all_tested():
    assert set(TRAINS) == set(FREEZE_POLICIES)


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("policy", TRAINS)
def test_gradients_exist_for_exactly_what_trains(policy, use_moe, make_vlm):
    model = make_vlm(with_tower=True, use_moe=use_moe, num_hidden_layers=3)
    freeze(model, "attention" if policy == "all" else "all")  # what an earlier policy left behind does not matter
    trained = freeze(model, policy)
    learn_once(model)
    expected = expected_names(model, policy)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == expected
    assert all(gradient.any() for gradient in gradients.values())
    assert {id(p) for p in trained} == {id(p) for name, p in model.named_parameters() if name in expected}
    assert len(trained) == len({id(p) for p in trained}), "a tied tensor must be updated once"


@pytest.mark.parametrize("policy", TRAINS)
def test_an_update_changes_nothing_else(policy, make_vlm):
    """Not even weight decay touches what is frozen."""
    model = make_vlm(with_tower=True, num_hidden_layers=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.AdamW(freeze(model, policy), lr=0.01, weight_decay=0.1)
    learn_once(model)
    optimiser.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == expected_names(model, policy) | ({"lm_head.weight"} if policy == "all" else set())
    assert any(name.startswith("vision_encoder.") for name in before)
