"""The mixture of experts against the plainest possible loops."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.model.kernels import cuda_moe
from minimind_v.core.model.kernels.accelerate import accelerate, plain
from minimind_v.core.model.kernels.cuda_moe import PROJECTIONS, is_grouped
from minimind_v.core.model.moe import MoEFeedForward

CONFIG = TextConfig(
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=24,
    use_moe=True,
    num_experts_per_tok=2,
    n_routed_experts=5,
    n_shared_experts=1,
    aux_loss_alpha=0.1,
)
VARIANTS = {
    "top 2 of 5, one shared": CONFIG,
    "top 1 of 3, none shared": replace(CONFIG, num_experts_per_tok=1, n_routed_experts=3, n_shared_experts=0),
    "top 3 of 4, two shared": replace(CONFIG, num_experts_per_tok=3, n_routed_experts=4, n_shared_experts=2),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def moe(request):
    torch.manual_seed(1)
    block = MoEFeedForward(request.param)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def swiglu(expert, x):
    return expert.down_proj.weight @ (F.silu(expert.gate_proj.weight @ x) * (expert.up_proj.weight @ x))


def route(moe, x):
    """One token's probabilities of all experts, and the likeliest experts."""
    probs = (moe.gate.weight @ x).softmax(dim=0)
    return probs, sorted(range(len(probs)), key=lambda expert: -float(probs[expert]))[: moe.gate.top_k]


@torch.no_grad()
def slow_output(moe, x):
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for at in range(x.shape[1]):
            token = x[row, at]
            probs, chosen = route(moe, token)
            total = sum(probs[expert] for expert in chosen) + 1e-20
            for expert in chosen:
                out[row, at] += probs[expert] / total * swiglu(moe.experts[expert], token)
            for expert in moe.shared_experts:
                out[row, at] += swiglu(expert, token)
    return out


@torch.no_grad()
def slow_aux(moe, x, lengths):
    """alpha · mean over rows of Σ_e f_e·P_e, over the first `lengths` tokens of each row."""
    experts, total = len(moe.experts), 0.0
    for row, length in enumerate(lengths):
        picks, mass = [0.0] * experts, [0.0] * experts
        for at in range(length):
            probs, chosen = route(moe, x[row, at])
            for expert in chosen:
                picks[expert] += 1
            for expert in range(experts):
                mass[expert] += float(probs[expert])
        for expert in range(experts):
            f = picks[expert] / (length * moe.gate.top_k) * experts
            total += f * mass[expert] / length
    return moe.alpha * total / len(lengths)


@pytest.mark.parametrize("training", [True, False])
def test_every_token_gets_its_experts(moe, training):
    x = torch.randn(3, 17, 16)
    out, aux = moe.train(training)(x, None)
    torch.testing.assert_close(out, slow_output(moe, x), atol=1e-4, rtol=1e-5)
    assert (aux is not None) == training, "the auxiliary loss belongs to training alone"


def test_an_expert_that_nobody_chooses(moe):
    with torch.no_grad():
        moe.gate.weight[0] = 0.0
        moe.gate.weight[1:] += 10.0
    x = torch.rand(2, 9, 16) + 0.1  # expert 0 always comes last
    out, _ = moe.eval()(x, None)
    torch.testing.assert_close(out, slow_output(moe, x), atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")
def test_grouped_products_are_those_of_every_expert(moe, monkeypatch):
    with torch.no_grad():
        moe.gate.weight[0] = -moe.gate.weight[1:].sum(dim=0)
    x = torch.randn(3, 17, 16)
    flow = torch.randn(3, 17, 16)
    accelerate(moe, torch.device("cuda"))
    results = []
    for at_once in (False, True):
        monkeypatch.setattr(cuda_moe, "is_grouped", lambda *_, at_once=at_once: at_once)
        read = x.clone().requires_grad_()
        out, _ = moe(read, None)
        moe.zero_grad()
        (out * flow).sum().backward()
        results.append([out, read.grad, *(parameter.grad for parameter in moe.parameters())])
    for grouped, other in zip(*results, strict=True):
        torch.testing.assert_close(grouped, other, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")
def test_the_host_need_not_know_whose_tokens_are_whose(monkeypatch):
    """Tensors that are only shapes stand for those of a GPU: to wait for a number of theirs raises."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        block = MoEFeedForward(CONFIG).eval()
        x = torch.empty(2, 9, 16, requires_grad=True)
        with pytest.raises(DynamicOutputShapeException):
            block(x, None)
        monkeypatch.setattr(cuda_moe, "is_grouped", lambda *_: True)
        out, _ = accelerate(block, torch.device("cuda"))(x, None)
        out.sum().backward()
    assert x.grad.shape == out.shape == x.shape
    assert block.experts[4].up_proj.weight.grad.shape == (24, 16)


# --- weights that are stored one behind another -----------------------------------------------------------------------


def grouped_block(monkeypatch, config=CONFIG, stack=True):
    """A block as on a GPU; the likeliest experts of no token are the last."""
    monkeypatch.setattr(cuda_moe, "is_grouped", lambda *_: True)
    torch.manual_seed(1)
    block = MoEFeedForward(config).train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        block.gate.weight[-1] = -block.gate.weight[:-1].sum(dim=0)
    accelerate(block, torch.device("cuda"))
    if not stack:
        block.unstack()
    return block


def bf16_step(block, seed=0):
    """The output and the gradients by name, in bf16."""
    torch.manual_seed(seed)
    x = torch.randn(3, 17, 16, requires_grad=True)
    block.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out, aux = block(x, None)
    (out.float().square().mean() + aux).backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}
    return {"out": out.detach(), "x": x.grad} | gradients


def assert_same_bits(tensors, expected):
    assert tensors.keys() == expected.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], expected[name])]
    assert not different


@pytest.fixture
def stackings(monkeypatch):
    """The types of the weights that a step has to copy together, projection by projection."""
    calls, stack = [], torch.stack

    def counted(tensors, *args, **options):
        calls.append(tensors[0].dtype)
        return stack(tensors, *args, **options)

    monkeypatch.setattr(torch, "stack", counted)
    return calls


needs_grouped = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")


@needs_grouped
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_stacked_weights_have_the_bits_of_single_ones(config, monkeypatch, stackings):
    together, apart = grouped_block(monkeypatch, config), grouped_block(monkeypatch, config, stack=False)
    stackings.clear()
    tensors = bf16_step(together)
    assert not stackings
    expected = bf16_step(apart)
    assert len(stackings) == 3
    assert_same_bits(tensors, expected)
    assert all(gradient.dtype == torch.float32 for name, gradient in tensors.items() if name != "out")


@needs_grouped
def test_an_expert_without_tokens_has_gradients_of_zero(monkeypatch):
    block = grouped_block(monkeypatch, replace(CONFIG, num_experts_per_tok=1, n_routed_experts=3))
    with torch.no_grad():
        block.gate.weight[1:] = 0
        block.gate.weight[1:, 0] = -100.0
    tokens = torch.rand(2, 9, 16) + 0.1
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = block(tokens, None)
    out.sum().backward()
    for number, expert in enumerate(block.experts):
        for weight in expert.parameters():
            assert bool(weight.grad.any()) == (number == 0)


def move_by_type(block):
    block.double().float()


def move_all(block):
    block.load_state_dict({name: tensor.clone() for name, tensor in block.state_dict().items()}, assign=True)


def move_one(block):
    block.experts[2].up_proj.weight = nn.Parameter(block.experts[2].up_proj.weight.detach().clone())


def move_memory(block):
    weight = block.experts[1].down_proj.weight
    weight.data = weight.detach().repeat(5, 1, 1)[1]  # of the same offset in other memory


def swap(block):
    block.experts[0], block.experts[3] = block.experts[3], block.experts[0]


def tie(block):
    block.experts[4].gate_proj.weight = block.experts[2].gate_proj.weight


MOVES = {move_by_type: 3, move_all: 3, move_one: 1, move_memory: 1, swap: 3, tie: 1}


@needs_grouped
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_weights_that_were_moved_are_copied_together(move, monkeypatch, stackings):
    together, apart = grouped_block(monkeypatch), grouped_block(monkeypatch, stack=False)
    for block in (together, apart):
        move(block)
    stackings.clear()
    tensors = bf16_step(together)
    assert len(stackings) == MOVES[move]
    assert_same_bits(tensors, bf16_step(apart))
    accelerate(together, torch.device("cuda"))
    stackings.clear()
    assert_same_bits(bf16_step(together), tensors)
    assert len(stackings) == (1 if move is tie else 0), "weights may be put together again"


@needs_grouped
def test_a_copy_of_a_block_has_weights_of_its_own(monkeypatch):
    block = grouped_block(monkeypatch)
    expected, twin = bf16_step(block), copy.deepcopy(block)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert_same_bits(bf16_step(block), expected)
    assert not torch.equal(bf16_step(twin)["out"], expected["out"])


@needs_grouped
def test_a_wrapped_linear_of_an_expert_is_called(monkeypatch):
    block, calls = grouped_block(monkeypatch), []

    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            calls.append(len(x))
            return self.base(x)

    expected = bf16_step(block)
    block.experts[1].up_proj = Wrapped(block.experts[1].up_proj)
    torch.testing.assert_close(bf16_step(block)["out"], expected["out"], atol=0.05, rtol=0.05)
    assert len(calls) == 1
    assert type(plain(accelerate(block, torch.device("cuda")))) is MoEFeedForward


@needs_grouped
def test_frozen_experts_are_cast_once_and_have_no_gradient(monkeypatch):
    together, apart = grouped_block(monkeypatch), grouped_block(monkeypatch, stack=False)
    for block in (together, apart):
        block.experts.requires_grad_(False)
    expected = bf16_step(apart)
    assert expected.keys() == {"out", "x", "gate.weight", *(f"shared_experts.0.{name}.weight" for name in PROJECTIONS)}
    assert_same_bits(bf16_step(together), expected)
    calls = []
    monkeypatch.setattr(cuda_moe, "stacked", lambda *args: calls.append(args))
    assert_same_bits(bf16_step(together), expected)
    assert not calls
    monkeypatch.undo()
    monkeypatch.setattr(cuda_moe, "is_grouped", lambda *_: True)
    for block in (together, apart):
        with torch.no_grad():
            block.experts[3].down_proj.weight.mul_(2)
    tensors = bf16_step(together)
    assert not torch.equal(tensors["out"], expected["out"])
    assert_same_bits(tensors, bf16_step(apart))


@needs_grouped
def test_one_frozen_expert_among_others_has_no_gradient(monkeypatch):
    together, apart = grouped_block(monkeypatch), grouped_block(monkeypatch, stack=False)
    for block in (together, apart):
        block.experts[2].requires_grad_(False)
    tensors = bf16_step(together)
    assert "experts.2.up_proj.weight" not in tensors
    assert_same_bits(tensors, bf16_step(apart))


@needs_grouped
def test_steps_of_adamw_and_files_do_not_depend_on_where_weights_are_stored(monkeypatch):
    together, apart = grouped_block(monkeypatch), grouped_block(monkeypatch, stack=False)
    assert list(together.state_dict()) == list(apart.state_dict())

    def train(block, steps, state=None):
        optimiser = torch.optim.AdamW(block.parameters(), 1e-2, fused=True)
        if state is not None:
            optimiser.load_state_dict(state)
        for seed in steps:
            bf16_step(block, seed)
            optimiser.step()
        return optimiser.state_dict()

    state = train(together, range(3))
    resumed = grouped_block(monkeypatch)
    resumed.load_state_dict(load(save(together.state_dict())))
    train(resumed, range(3, 6), state)
    train(apart, range(6))
    assert_same_bits(resumed.state_dict(), apart.state_dict())


def test_the_plain_block_has_each_weight_by_itself_again(monkeypatch):
    block = grouped_block(monkeypatch)
    before, weight = copy.deepcopy(block.state_dict()), block.experts[1].up_proj.weight
    assert weight.untyped_storage().nbytes() == 5 * weight.nbytes
    assert plain(block).experts[1].up_proj.weight is weight
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert_same_bits(block.state_dict(), before)


@dataclass
class OnAGpu:
    """All that is asked of a tensor there."""

    dtype: torch.dtype = torch.bfloat16
    tokens: int = 5

    @property
    def device(self):
        return torch.device("cuda")

    def __len__(self):
        return self.tokens


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")
def test_where_experts_are_grouped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert is_grouped(OnAGpu(), 1408, 512)
    assert not is_grouped(OnAGpu(), 1404, 512), "rows of whole 16 bytes only"
    assert not is_grouped(OnAGpu(dtype=torch.float32), 1408, 512)
    assert not is_grouped(OnAGpu(tokens=0), 1408, 512)
    assert not is_grouped(torch.empty(5, 512, dtype=torch.bfloat16), 1408, 512), "a CPU has no such kernel"
    for older in (
        (7, 5),
        (8, 0),
        (8, 6),
        (12, 0),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=older: capability)
        assert not is_grouped(OnAGpu(), 1408, 512)


def test_auxiliary_loss(moe):
    x, lengths = torch.randn(3, 17, 16), (17, 5, 1)
    mask = torch.arange(17) < torch.tensor(lengths)[:, None]
    _, aux = moe.train()(x, mask)
    assert aux.item() == pytest.approx(slow_aux(moe, x, lengths), rel=1e-5)
    _, aux = moe(x, None)
    assert aux.item() == pytest.approx(slow_aux(moe, x, (17, 17, 17)), rel=1e-5)


def test_auxiliary_loss_over_a_batch_is_that_of_all_its_tokens_as_one_row():
    block = MoEFeedForward(replace(CONFIG, num_experts_per_tok=1, n_shared_experts=0, aux_loss_scope="batch")).train()
    x, lengths = torch.randn(3, 17, 16), (17, 5, 1)
    mask = torch.arange(17) < torch.tensor(lengths)[:, None]
    tokens = torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
    assert block(x, mask)[1].item() == pytest.approx(slow_aux(block, tokens[None], (23,)), rel=1e-5)
    by_rows = slow_aux(block, x, lengths)
    assert block(x, mask)[1].item() != pytest.approx(by_rows, rel=1e-2), "the scope makes no difference"


def test_auxiliary_loss_does_not_depend_on_padding(moe):
    x, mask = torch.randn(2, 12, 16), torch.arange(12) < torch.tensor([[12], [4]])
    _, aux = moe.train()(x, mask)
    wider = torch.cat((x, torch.randn(2, 30, 16)), dim=1)
    _, padded = moe(wider, F.pad(mask, (0, 30)))
    assert padded.item() == pytest.approx(aux.item(), rel=1e-6)
    assert moe(wider, None)[1].item() != pytest.approx(aux.item(), rel=1e-2), "the mask makes no difference"


def test_auxiliary_loss_teaches_only_the_router(moe):
    _, aux = moe.train()(torch.randn(2, 12, 16), None)
    aux.backward()
    taught = {name for name, parameter in moe.named_parameters() if parameter.grad is not None}
    assert taught == {"gate.weight"}
    assert moe.gate.weight.grad.abs().max() > 1e-6


def test_model_sums_its_layers(make_vlm):
    """The model's auxiliary loss is the sum over layers in training, and zero otherwise and without experts."""
    model, input_ids = make_vlm(use_moe=True, num_hidden_layers=3).train(), torch.randint(0, 61, (2, 15))
    mask = torch.arange(15) < torch.tensor([[15], [8]])
    calls = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, output: calls.append((args[0], output[1])))
    out = model(input_ids, attention_mask=mask, labels=input_ids)
    by_hand = [
        slow_aux(layer.mlp, x.detach(), (15, 8)) for layer, (x, _) in zip(model.model.layers, calls, strict=True)
    ]
    assert out.aux_loss.item() == pytest.approx(sum(by_hand), rel=1e-5)
    assert out.loss.item() == pytest.approx((out.loss_sum / len(out.correct) + out.aux_loss).item(), rel=1e-6)
    assert model.eval()(input_ids, attention_mask=mask).aux_loss.item() == 0
    assert make_vlm().train()(input_ids, attention_mask=mask).aux_loss.item() == 0
