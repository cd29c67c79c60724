"""The arithmetic of training: the schedule by hand, accumulation, and the whole loop against a plain and slow one."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModel

import minimind_v.core.demo
from minimind_v.core.config.schedule import COSINE_2025, COSINE_2026
from minimind_v.core.config.schema import DataConfig, RunConfig, TextConfig
from minimind_v.core.data.batch import Batch
from minimind_v.core.demo.dataset import write_sft
from minimind_v.core.errors import RunError
from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vision.encoder import CLIP_MEAN, CLIP_STD, VisionSpec
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train import step as train_step
from minimind_v.core.train.run import assemble
from tests.model.conftest import NORMED_EXPERTS, tiny_vlm

ASSETS = Path(minimind_v.core.demo.__file__).parent / "assets"
TINY = TextConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    vocab_size=600,
)
EXPERTS = replace(TINY, use_moe=True, n_routed_experts=3, intermediate_size=32)

# --- micro-batches on a CPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "passes"), [("row", 2), ("batch", 1)])
def test_a_balance_over_a_whole_micro_batch_is_computed_at_once(scope, passes, run_over, tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "CPU_POSITIONS", 30)
    model = tiny_vlm(**NORMED_EXPERTS | {"aux_loss_scope": scope}).train()
    ids = torch.randint(6, 61, (2, 20))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids.clone(), torch.zeros_like(ids, dtype=torch.bool))
    expected = model(**batch.tokens).aux_loss
    aux_losses: list[torch.Tensor] = []
    model.register_forward_hook(lambda *call: aux_losses.append(call[-1].aux_loss.detach()))
    config = RunConfig(
        stage="sft", model=model.config, data=DataConfig(batch_size=2, workers=0), out=tmp_path, max_steps=1,
        dtype="float32", device="cpu", save_every=0,
    )  # fmt: skip
    run_over(config, model, [batch]).run()
    assert len(aux_losses) == passes
    assert torch.stack(aux_losses).mean().item() == pytest.approx(expected.item(), rel=1e-5)


# --- schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "total", "peak", "expected"),
    [
        (0, 4, 1.0, 1.1),
        (1, 4, 1.0, 0.6 + 0.25 * math.sqrt(2)),  # cos 45°
        (2, 4, 1.0, 0.6),
        (3, 4, 1.0, 0.6 - 0.25 * math.sqrt(2)),
        (4, 4, 1.0, 0.1),
        (100, 300, 4e-4, 3.4e-4),  # cos 60°
        (200, 300, 4e-4, 1.4e-4),
        (0, 1, 1e-6, 1.1e-6),
    ],
)
def test_schedule_by_hand(step, total, peak, expected):
    assert COSINE_2025.rate(step + 1, total, peak) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "total", "lr", "expected"),
    [
        (1, 6, 5e-4, 5e-4 * (0.55 + 0.225 * math.sqrt(3))),  # cos 30°
        (3, 6, 5e-4, 2.75e-4),
        (6, 6, 5e-4, 5e-5),
        (100, 300, 4e-6, 3.1e-6),  # cos 60°
    ],
)
def test_schedule_of_minimind_3v_by_hand(step, total, lr, expected):
    assert COSINE_2026.rate(step, total, lr) == pytest.approx(expected, rel=1e-12)


# --- accumulation -----------------------------------------------------------------------------------------------------


def random_batch(lengths: list[int], answers: list[int]) -> Batch:
    """Rows of these lengths, each behind a picture of four patches, each with so many supervised tokens at its end."""
    longest = max(lengths)
    at = torch.arange(longest)
    ends, starts = torch.tensor(lengths)[:, None], torch.tensor([n - a for n, a in zip(lengths, answers, strict=True)])
    input_ids = torch.randint(10, 600, (len(lengths), longest))
    attention_mask = at < ends  # [B, T]
    labels = torch.where(attention_mask & (at >= starts[:, None]), input_ids, IGNORE)
    image_mask = ((at >= 1) & (at < 5)).expand_as(input_ids)
    features = torch.randn(len(lengths), 4, 24)
    return Batch(input_ids, attention_mask, labels, image_mask.clone(), image_features=features)


def part_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch, with no more padding than they need."""
    longest = int(batch.attention_mask[rows].sum(dim=1).max())
    cut = {
        name: getattr(batch, name)[rows, :longest] for name in ("input_ids", "attention_mask", "labels", "image_mask")
    }
    return replace(batch, **cut, image_features=batch.image_features[rows])


@pytest.fixture
def one_step(run_over, events, tmp_path):
    """Trains a fresh model for one step on these batches together; returns its metrics and clipped gradients."""

    def step(config: TextConfig, batches: list[Batch]):
        torch.manual_seed(1)
        model = VLM(config, VisionSpec(image_size=2, patch_size=1, width=24), placeholder_id=5)
        run_config = RunConfig(
            stage="sft",
            model=config,
            data=DataConfig(workers=0),
            out=tmp_path / f"{len(batches)} batches",
            accumulate=len(batches),
            dtype="float32",
            device="cpu",
        )
        run = run_over(run_config, model, batches)
        gradients = {}
        run.train_step.optimiser.register_step_pre_hook(
            lambda *_: gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})
        )
        run.run()
        metrics = events.steps[-1]
        return metrics, gradients

    return step


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("config", [TINY, EXPERTS], ids=["dense", "experts"])
def test_two_micro_batches_equal_one(config, first, one_step):
    """Micro-batches of unequal rows and supervised tokens: every token weighs the same, and so does every row."""
    torch.manual_seed(0)
    whole = random_batch(lengths=[30, 12, 25, 9], answers=[20, 1, 5, 2])
    micro_batches = [part_of(whole, slice(0, first)), part_of(whole, slice(first, 4))]
    assert micro_batches[0].supervised != micro_batches[1].supervised
    together, expected = one_step(config, [whole])
    apart, gradients = one_step(config, micro_batches)
    assert apart.loss == pytest.approx(together.loss, rel=1e-5)
    assert apart.grad_norm == pytest.approx(together.grad_norm, rel=1e-5)
    assert (apart.samples, apart.tokens, apart.supervised_tokens) == (4, 76, 28)
    assert (together.samples, together.tokens, together.supervised_tokens) == (4, 76, 28)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_run_without_one_finite_loss_fails_even_where_it_is_short(one_step):
    torch.manual_seed(0)
    batch = random_batch(lengths=[30, 12], answers=[20, 1])
    batch.image_features[1] = math.inf
    with pytest.raises(RunError, match="1 step in a row without a finite loss"):
        one_step(TINY, [batch])


# --- the whole loop ---------------------------------------------------------------------------------------------------

STEPS, ROWS, LENGTH = 50, 90, 256


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_sft(tmp_path_factory.mktemp("data"), random.Random(3), ROWS)[0]


class PlainModel:
    """The published model written down as its formulas, over a dict of weights."""

    def __init__(self, config: TextConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    def __call__(self, input_ids: Tensor, image_mask: Tensor, features: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all positions [B, T, V], and the auxiliary loss over the positions to `keep`."""
        w, aux = self.weights, torch.zeros(())
        x = w["model.embed_tokens.weight"][input_ids]
        x[image_mask] = (
            features @ w["vision_proj.vision_proj.0.weight"].T + w["vision_proj.vision_proj.0.bias"]
        ).flatten(0, 1)
        for layer in range(self.config.num_hidden_layers):
            at = f"model.layers.{layer}."
            x = x + self.attention(self.rms(x, f"{at}input_layernorm"), f"{at}self_attn.")
            normed = self.rms(x, f"{at}post_attention_layernorm")
            if self.config.use_moe:
                y, layer_aux = self.experts(normed, f"{at}mlp.", keep)
                x, aux = x + y, aux + layer_aux
            else:
                x = x + self.swiglu(normed, f"{at}mlp.")
        return self.rms(x, "model.norm") @ w["model.embed_tokens.weight"].T, aux

    def rms(self, x: Tensor, name: str) -> Tensor:
        return (
            x
            / (x.square().mean(dim=-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
            * self.weights[f"{name}.weight"]
        )

    def swiglu(self, x: Tensor, at: str) -> Tensor:
        gate, up, down = (self.weights[f"{at}{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def turn(self, x: Tensor) -> Tensor:
        """Rotary positions [B, heads, T, hd]: dimensions i and i + hd/2 are one complex number, turned by its angle."""
        half = x.shape[-1] // 2
        speed = self.config.rope_theta ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[2])[:, None] * speed
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def attention(self, x: Tensor, at: str) -> Tensor:
        heads, kv = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = (x @ self.weights[f"{at}{name}_proj.weight"].T for name in "qkv")
        q, k, v = (y.unflatten(-1, (count, -1)).transpose(1, 2) for y, count in ((q, heads), (k, kv), (v, kv)))
        k, v = self.turn(k).repeat_interleave(heads // kv, dim=1), v.repeat_interleave(heads // kv, dim=1)
        scores = self.turn(q) @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [B, heads, T, T]
        scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2) @ self.weights[f"{at}o_proj.weight"].T

    def experts(self, x: Tensor, at: str, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Every expert works on every token; what was not chosen weighs nothing."""
        count, top_k = self.config.n_routed_experts, self.config.num_experts_per_tok
        probs = (x @ self.weights[f"{at}gate.weight"].T).softmax(dim=-1)  # [B, T, E]
        chosen = F.one_hot(probs.topk(top_k).indices, count).sum(dim=2)  # [B, T, E]
        weight = probs * chosen / ((probs * chosen).sum(dim=-1, keepdim=True) + 1e-20)
        y = sum(self.swiglu(x, f"{at}experts.{n}.") * weight[..., n, None] for n in range(count))
        y = y + self.swiglu(x, f"{at}shared_experts.0.")
        per_row = [
            (chosen[row, ok].float().mean(dim=0) / top_k * count * probs[row, ok].mean(dim=0)).sum()
            for row, ok in enumerate(keep)
        ]
        return y, self.config.aux_loss_alpha * torch.stack(per_row).mean()


def padded(batch: Batch, name: str, filler: int) -> Tensor:
    tensor = getattr(batch, name)
    return F.pad(tensor, (0, LENGTH - tensor.shape[1]), value=filler)


def plain_loop(
    config: RunConfig, weights: dict[str, Tensor], trainable: set[str], steps: list[list[Batch]]
) -> list[float]:
    """Train as slowly and plainly as can be; returns the loss of each update."""
    tower = CLIPVisionModel.from_pretrained(ASSETS / "vision", dtype=torch.float32).eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    model = PlainModel(config.model, weights)
    moments = {name: (torch.zeros_like(weights[name]), torch.zeros_like(weights[name])) for name in trainable}
    losses = []
    for step, batches in enumerate(steps):
        for name in trainable:
            weights[name] = weights[name].detach().requires_grad_()
        nll, counted, aux, total_rows = torch.zeros(()), 0, torch.zeros(()), sum(map(len, batches))
        for batch in batches:
            with torch.no_grad():
                features = tower((batch.pixel_values / 255 - mean) / std).last_hidden_state[:, 1:]
            labels, keep = padded(batch, "labels", IGNORE), padded(batch, "attention_mask", 0)
            logits, batch_aux = model(padded(batch, "input_ids", 0), padded(batch, "image_mask", 0), features, keep)
            logp = logits.log_softmax(dim=-1)[:, :-1]  # [B, T-1, V]
            picked = logp.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]  # [B, T-1]
            supervised = labels[:, 1:] != IGNORE
            nll = nll - (picked * supervised).sum()
            counted += int(supervised.sum())
            aux = aux + batch_aux * len(batch) / total_rows
        loss = nll / counted + aux
        losses.append(loss.item())
        names = sorted(trainable)
        grads = dict(zip(names, torch.autograd.grad(loss, [weights[name] for name in names]), strict=True))
        norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
        lr = config.lr / 10 + 0.5 * config.lr * (1 + math.cos(math.pi * step / len(steps)))
        for name, grad in grads.items():  # AdamW by its formulas
            grad = grad * min(1.0, config.grad_clip / (norm + 1e-6))
            first, second = moments[name]
            first = 0.9 * first + 0.1 * grad
            second = 0.999 * second + 0.001 * grad.square()
            moments[name] = first, second
            ahead = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            weights[name] = weights[name].detach() * (1 - lr * config.weight_decay) - lr * ahead
    return losses


LEARNS = {
    "all": lambda name: True,
    "projector+last": lambda name: name.startswith(("vision_proj.", "model.layers.1.")),
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "freeze", "accumulate"),
    [(TINY, "all", 1), (TINY, "projector+last", 2), (EXPERTS, "all", 1)],
    ids=["dense", "dense, last layer, accumulated", "experts"],
)
def test_loss_curve_is_that_of_a_plain_loop(model, freeze, accumulate, rows, events, tmp_path):
    """Fifty steps over more than one epoch: full logits, padding to the full length, a causal mask, AdamW by hand."""
    data = DataConfig(rows.data, rows.images, ASSETS, max_length=LENGTH, batch_size=2, workers=0)
    config = RunConfig(
        stage="sft",
        model=model,
        data=data,
        vision_model=ASSETS / "vision",
        out=tmp_path,
        freeze=freeze,
        epochs=4,
        lr=3e-3,
        accumulate=accumulate,
        features="off",  # so that the plan gives pixels afterwards
        max_steps=STEPS,
        dtype="float32",
        device="cpu",
        save_every=0,
    )
    run = assemble(config, events)
    weights = {
        name: tensor.clone()
        for name, tensor in run.train_step.model.state_dict().items()
        if "vision_encoder." not in name
    }
    del weights["lm_head.weight"]  # tied
    run.run()

    steps = [run.plan[number] for number in range(STEPS)]
    trainable = {name for name in weights if LEARNS[freeze](name)}
    expected = plain_loop(config, weights, trainable, steps)
    losses = [metrics.loss for metrics in events.steps]
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=1e-4)
    # The median of the last few: single batches differ more from each other than a frozen model learns.
    assert statistics.median(losses[-5:]) < 0.95 * losses[0], "nothing was learnt, so little was compared"
    for name, tensor in weights.items():
        torch.testing.assert_close(run.train_step.model.state_dict()[name], tensor, atol=1e-4, rtol=1e-3)


# --- only the projector learns ----------------------------------------------------------------------------------------


@pytest.fixture
def words_and_pictures(rows, tmp_path):
    """Rows without a picture, long enough to be micro-batches of their own, behind the rows with one."""
    talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a star " * 20}]
    path = tmp_path / "mixed.jsonl"
    path.write_text(rows.data.read_text() + 12 * (json.dumps({"conversations": talk}) + "\n"))
    return path


@pytest.mark.long
@pytest.mark.parametrize("only_words", [False, True])
def test_rows_without_a_picture_teach_a_projector_nothing(only_words, words_and_pictures, rows, events, tmp_path):
    path = words_and_pictures
    if only_words:
        path = tmp_path / "words.jsonl"
        path.write_text("".join(words_and_pictures.read_text().splitlines(True)[-12:]))
    data = DataConfig(path, None if only_words else rows.images, ASSETS, max_length=LENGTH, batch_size=2, workers=0)
    config = RunConfig(
        stage="sft", model=TINY, data=data, vision_model=ASSETS / "vision", out=tmp_path / "out", freeze="projector",
        epochs=1, lr=3e-3, dtype="float32", device="cpu", save_every=0, weight_decay=0.0,
    )  # fmt: skip
    run = assemble(config, events)
    before = {name: tensor.clone() for name, tensor in run.train_step.model.state_dict().items()}
    run.run()
    assert 0.0 in [metrics.grad_norm for metrics in events.steps]
    changed = {
        name for name, tensor in run.train_step.model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == (set() if only_words else {name for name in before if name.startswith("vision_proj.")})


def test_who_asks_a_model_in_training_hears_what_it_has_learnt(rows, events, tmp_path):
    """What is laid out for talking is made of the weights, and follows them though a fused step does not say so."""
    data = DataConfig(rows.data, rows.images, ASSETS, max_length=LENGTH, batch_size=2, workers=0)
    config = RunConfig(
        stage="sft", model=TINY, data=data, vision_model=ASSETS / "vision", out=tmp_path, freeze="all", epochs=1,
        lr=1e-2, max_steps=2, dtype="float32", device="cpu", save_every=0,
    )  # fmt: skip
    run, ids = assemble(config, events), torch.arange(10, 30)[None]

    @torch.inference_mode()
    def heard() -> Tensor:
        decoder = ready(run.train_step.model).decoder
        return decoder.read(run.train_step.model.embed(ids), decoder.new_cache(1, 32))

    before = heard()
    run.run()
    run.train_step.model.eval()
    assert not torch.allclose(heard(), before)
    with torch.inference_mode():
        torch.testing.assert_close(heard(), run.train_step.model(ids).logits[:, -1], atol=1e-5, rtol=0)


def test_the_optimiser_is_torchs_own_whose_state_it_takes():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimisers = [
        train_step.AdamW(ours.parameters(), 1e-2, torch.device("cpu"), 0.1),
        torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=0.1, fused=True),
    ]
    for _ in range(3):
        x = torch.randn(4, 5)
        for layer, optimiser in zip((ours, theirs), optimisers, strict=True):
            layer(x).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
        states = [optimiser.state_dict() for optimiser in optimisers]
        assert states[0].keys() == states[1].keys()
        assert states[0]["param_groups"] == states[1]["param_groups"]
        for optimiser, state in zip(optimisers, reversed(states), strict=True):
            optimiser.load_state_dict(state)
