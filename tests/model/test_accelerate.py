"""An accelerated model is the plain one: the same numbers, gradients and names, and a way back."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minimind_v.core.config.schema import FREEZE_POLICIES
from minimind_v.core.model.decoder import Attention, RMSNorm
from minimind_v.core.model.feed_forward import FeedForward
from minimind_v.core.model.kernels import cpu_training
from minimind_v.core.model.kernels.accelerate import FAST, accelerate, plain
from minimind_v.core.model.kernels.cpu_clip import CpuSiglipVision
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.freeze import freeze
from tests.model.conftest import NORMED, NORMED_EXPERTS, spread, tiny_vlm

CPU = torch.device("cpu")
FAST_CLASSES = set(FAST["cpu"].values())


def pair(policy: str = "all", **sizes: object) -> tuple[VLM, VLM]:
    """The same model, plain and accelerated."""
    models = tiny_vlm(num_hidden_layers=3, **sizes).train(), tiny_vlm(num_hidden_layers=3, **sizes).train()
    for model in models:
        freeze(model, policy)
    return models[0], accelerate(models[1], CPU)


def batch(rows: int = 3, length: int = 40) -> dict[str, torch.Tensor]:
    """Right-padded rows with an image each and supervised tokens behind it."""
    torch.manual_seed(length)
    ids, at = torch.randint(6, 61, (rows, length)), torch.arange(length)
    ids[:, 1:5] = 5
    mask = at < torch.tensor([length - 2 * row for row in range(rows)])[:, None]
    labels = torch.where(mask & (at > 6) & (torch.rand(rows, length) < 0.5), ids, IGNORE)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "image_features": torch.randn(rows, 4, 24)}


def step(model: VLM, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(reference: VLM, other: VLM, inputs: dict[str, torch.Tensor]) -> None:
    (loss, gradients), (expected_loss, expected) = step(other, inputs), step(reference, inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


KINDS = {
    "dense": {},
    "experts": {"use_moe": True},
    "normed heads": NORMED | {"projector": "mlp"},
    "normed heads, experts": NORMED_EXPERTS | {"projector": "mlp"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", FREEZE_POLICIES)
def test_loss_and_every_gradient(policy, kind):
    assert_same_step(*pair(policy, **KINDS[kind]), batch())


@pytest.mark.parametrize("length", [9, cpu_training.BLOCK, cpu_training.BLOCK + 1, 2 * cpu_training.BLOCK + 17])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rows_of_any_length_and_any_number_of_heads(length, heads, qk_norm):
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "qk_norm": qk_norm}
    assert_same_step(*pair(**sizes), batch(length=length))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_rows_whose_attention_is_too_long_to_be_kept(qk_norm, monkeypatch):
    monkeypatch.setattr(cpu_training, "WEIGHTS_KEPT", 20)
    assert_same_step(*pair(qk_norm=qk_norm), batch())


@pytest.mark.parametrize("trains", ["q_norm", "k_norm", "q_proj"])
def test_each_gradient_of_normed_heads_alone(trains):
    models = pair(**NORMED)
    for model in models:
        model.requires_grad_(False)
        model.model.layers[1].self_attn.get_submodule(trains).requires_grad_(True)
    assert_same_step(*models, batch())


def test_a_hook_on_the_norm_of_heads_is_called():
    reference, other = pair(**NORMED)
    calls: list[str] = []
    other.model.layers[1].self_attn.k_norm.register_forward_hook(lambda *_: calls.append("k_norm"))
    assert_same_step(reference, other, batch())
    assert calls == ["k_norm"]


@pytest.mark.parametrize("trainable", [p for p in itertools.product((True, False), repeat=4) if any(p)])
def test_each_gradient_alone(trainable):
    """Whatever of a block trains, and whether what stands before it does."""
    models = pair()
    for model in models:
        model.requires_grad_(False)
        block = model.model.layers[1]
        modules = (model.vision_proj, block.self_attn.k_proj, block.mlp.up_proj, block.post_attention_layernorm)
        for module, trains in zip(modules, trainable, strict=True):
            module.requires_grad_(trains)
    assert_same_step(*models, batch())


def test_written_out_passes_are_used_in_training_alone():
    model, inputs = pair()[1], batch()
    x = torch.randn(2, 9, 32, requires_grad=True)
    block = model.model.layers[0]
    modules = block.input_layernorm, block.mlp
    assert {type(module(x).grad_fn).__name__ for module in modules} == {"_RmsNormBackward", "ViewBackward0"}
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, plain(copy.deepcopy(model))(**inputs).loss)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_with_a_cache(qk_norm):
    reference, other = pair(qk_norm=qk_norm)
    ids = torch.randint(6, 61, (2, 30))
    for model in (reference.eval(), other.eval()):
        cache = model.new_cache(2, 30)
        with torch.enable_grad():
            chunks = [model(chunk, cache=cache).logits for chunk in ids.split((7, 1, 22), dim=1)]
        torch.testing.assert_close(torch.cat(chunks, dim=1), reference(ids).logits, atol=2e-5, rtol=0)


def test_in_bf16_the_plain_code_runs():
    reference, other = pair()
    with torch.autocast("cpu", torch.bfloat16):
        (loss, gradients), (expected_loss, expected) = step(other, batch()), step(reference, batch())
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())


def test_in_double_precision_the_backward_passes_are_those_of_finite_differences():
    torch.manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.double, requires_grad=True)

    assert torch.autograd.gradcheck(
        cpu_training._FeedForward.apply, [drawn(5, 6), drawn(8, 6), drawn(8, 6), drawn(6, 8)]
    )
    assert torch.autograd.gradcheck(lambda x, w: cpu_training._RmsNorm.apply(x, w, 1e-5), [drawn(5, 6), drawn(6)])
    angles = torch.rand(1, 1, 5, 3, dtype=torch.double).repeat(1, 1, 1, 2)
    weights = drawn(12, 6), drawn(6, 6), drawn(6, 6)
    project = cpu_training._Project.apply
    for norms in ((None, None), (drawn(6), drawn(6))):
        assert torch.autograd.gradcheck(
            lambda *given: project(*given, angles.cos(), angles.sin(), 1e-2), [drawn(2, 5, 6), *weights, *norms]
        )
    assert torch.autograd.gradcheck(
        cpu_training._Attend.apply, [drawn(2, 4, 5, 3), drawn(2, 2, 5, 3), drawn(2, 2, 5, 3)]
    )


# --- what stands in a block's place -----------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A Linear with a trainable product of two small matrices beside it (LoRA)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features) / 4)
        self.b = nn.Parameter(torch.randn(base.out_features, 2) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
)
@pytest.mark.parametrize("before", [True, False], ids=["wrapped, then accelerated", "accelerated, then wrapped"])
def test_a_wrapped_linear_is_called(name, before):
    reference, other = pair()
    torch.manual_seed(1)
    wrapped = LowRank(reference.get_submodule(f"model.layers.1.{name}"))
    plain(other)
    merged = copy.deepcopy(other)  # with the product added to the weight: what the wrapped one must compute
    merged.get_submodule(f"model.layers.1.{name}").weight.data += wrapped.b.detach() @ wrapped.a.detach()
    for model in (reference, other):
        if model is other and not before:
            accelerate(other, CPU)
        own = copy.deepcopy(wrapped)
        own.base = model.get_submodule(f"model.layers.1.{name}")
        model.set_submodule(f"model.layers.1.{name}", own)
    accelerate(other, CPU)
    assert_same_step(reference, other, batch())
    assert other.get_parameter(f"model.layers.1.{name}.a").grad.abs().max() > 0
    torch.testing.assert_close(step(other, batch())[0], step(accelerate(merged, CPU), batch())[0], rtol=1e-4, atol=1e-5)


def test_hooks_are_called():
    reference, other = pair()
    calls: list[str] = []
    for name, module in other.model.layers[1].named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    assert_same_step(reference, other, batch())
    assert {name for name, _ in other.model.layers[1].named_modules()} <= set(calls)


# --- putting on and taking off ----------------------------------------------------------------------------------------


def classes(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


def test_it_may_be_done_twice_and_undone():
    reference, other = pair(with_tower=True)
    assert classes(other) >= FAST_CLASSES - {CpuSiglipVision}
    before = classes(other)
    assert classes(accelerate(other, CPU)) == before
    assert list(other.state_dict()) == list(reference.state_dict())
    assert classes(accelerate(other, torch.device("cuda"))) == classes(reference), "dense: nothing is faster there"
    assert classes(plain(accelerate(other, CPU))) == classes(reference)


def test_a_subclass_of_somebody_elses_stays_what_it_is():
    class Own(FeedForward):
        pass

    reference = pair()[0]
    reference.model.layers[0].mlp.__class__ = Own
    accelerate(reference, CPU)
    assert type(reference.model.layers[0].mlp) is Own
    assert type(plain(reference).model.layers[0].mlp) is Own


@torch.no_grad()
def test_copies_and_moved_models_compute_by_their_own_weights():
    reference, other = pair(with_tower=True)
    pixels = torch.randn(1, 3, 16, 16)
    features = other.vision_encoder(pixels)
    twin = copy.deepcopy(other)
    twin.vision_encoder.tower.encoder.layers[0].mlp.fc1.bias.add_(1.0)
    twin.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    assert not torch.equal(twin.vision_encoder(pixels), features)
    assert torch.equal(other.vision_encoder(pixels), features)
    assert classes(twin) == classes(other)
    with torch.enable_grad():
        assert_same_step(reference, other, batch())
        reference.double()
        other.double()
        inputs = batch()
        inputs["image_features"] = inputs["image_features"].double()
        assert_same_step(reference, other, inputs)


@torch.no_grad()
def test_new_weights_are_used():
    """Written in place, or other tensors in their stead."""
    reference, other = pair(with_tower=True)
    fresh = {name: torch.randn_like(tensor) / 4 for name, tensor in reference.state_dict().items()}
    pixels = torch.randn(1, 3, 16, 16)
    for assign in (False, True):
        for model in (reference, other):
            model.vision_encoder(pixels)  # packs what is there now
            model.load_state_dict(
                {name: tensor * (2 if assign else 1) for name, tensor in fresh.items()}, assign=assign
            )
        torch.testing.assert_close(other.vision_encoder(pixels), reference.vision_encoder(pixels))
    for model in (reference, other):
        model.requires_grad_(True)
    with torch.enable_grad():
        assert_same_step(reference, other, batch())


@pytest.mark.parametrize("qk_norm", [False, True])
def test_apples_formulas_are_the_same(qk_norm):
    reference, other = pair(with_tower=True, qk_norm=qk_norm)
    accelerate(other, torch.device("mps"))
    assert not classes(other) & {Attention, RMSNorm}
    assert_same_step(reference, other, batch())
    for model in (reference, other):  # the wide weights of `tiny_encoder` multiply rounding by a hundred
        spread(model.vision_encoder, 0)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(other.vision_encoder(pixels), reference.vision_encoder(pixels))
