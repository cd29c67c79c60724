"""Under autocast a frozen Linear keeps its cast: the same bits, and the weight stays what it is."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minimind_v.core.config.freeze import FREEZE_POLICIES
from minimind_v.core.model.kernels.accelerate import cast_frozen_once, plain
from minimind_v.core.model.kernels.cuda_linear import CudaLinear
from minimind_v.core.train.freeze import freeze
from tests.model.conftest import NORMED, tiny_vlm
from tests.model.test_accelerate import batch

KINDS = {"dense": {}, "experts": {"use_moe": True}, "normed heads": NORMED | {"projector": "mlp"}}


class Casts(TorchDispatchMode):
    """Counts the casts to bf16 by the address of what is cast."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.counts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def keeping(model):
    """The frozen Linears of a model on a CPU as they are on a GPU."""
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.__class__ = CudaLinear
    return model


def new_model(policy="projector+last", **sizes):
    model = tiny_vlm(with_tower=True, num_hidden_layers=3, **sizes).train()
    freeze(model, policy)
    return model


def inputs():
    return batch() | {"image_features": None, "pixel_values": torch.randn(3, 3, 16, 16)}


def step(model):
    """The loss and every gradient, computed in bf16."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs()).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("policy", FREEZE_POLICIES)
def test_the_loss_and_every_gradient_have_the_same_bits(policy, kind):
    expected, other = step(new_model(policy, **kind)), keeping(new_model(policy, **kind))
    for _ in range(2):  # the second one with what is kept
        tensors = step(other)
        assert len(tensors) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))


def test_a_frozen_weight_is_cast_once_and_a_trained_one_in_every_step():
    model = keeping(new_model())
    casts = []
    for _ in range(3):
        with Casts() as mode:
            step(model)
        casts.append(mode.counts)
    frozen, trained = model.model.layers[0].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight
    encoder = model.vision_encoder.tower.encoder.layers[0].mlp.fc1
    for tensor in (frozen, encoder.weight, encoder.bias):
        assert [counts[tensor.data_ptr()] for counts in casts] == [1, 0, 0]
    assert [counts[trained.data_ptr()] for counts in casts] == [1, 1, 1]
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_what_is_written_to_a_frozen_weight_counts():
    reference, other = new_model(), keeping(new_model())
    step(other)
    for model in (reference, other):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.ones(32, 48), requires_grad=False)
    assert all(torch.equal(*pair) for pair in zip(step(other), step(reference), strict=True))


def test_a_cast_that_was_made_in_inference_may_be_trained_through():
    reference, other = new_model(), keeping(new_model())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        other(**inputs())
    assert all(torch.equal(*pair) for pair in zip(step(other), step(reference), strict=True))


def test_without_autocast_nothing_is_cast():
    reference, other = new_model(), keeping(new_model())
    assert torch.equal(reference(**inputs()).loss, other(**inputs()).loss)
    assert not any("_kept" in vars(module) for module in other.modules())


def test_it_is_put_on_where_modules_are_on_a_gpu_and_taken_off_again():
    model = new_model()
    cast_frozen_once(model)
    assert CudaLinear not in {type(module) for module in model.modules()}, "on a CPU nothing changes"
    assert type(plain(keeping(nn.Sequential(nn.Linear(2, 2).requires_grad_(False))))[0]) is nn.Linear
