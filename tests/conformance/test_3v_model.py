"""The numbers of minimind-3v's model as the published code computes them, made again by this one.

The set is read from a folder (MMV_CONFORMANCE_3V, else `../shared/conformance-3v`), its tokenizer from `tokenizer-3v`
beside it, else from the standard place. Nothing here knows a case or a size: another set of the same form runs
unchanged. MMV_DEVICE names a device to compute on, MMV_DTYPE a precision other than fp32.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minimind_v.core.config.schema import DataConfig, RunConfig
from minimind_v.core.data.batch import Batch
from minimind_v.core.device import autocast, pick_device
from minimind_v.core.formats.load import load
from minimind_v.core.generate import prompt_cache
from minimind_v.core.generate.rows import Row, generate
from minimind_v.core.generate.sampling import GREEDY, Sampler
from minimind_v.core.model.kernels.accelerate import accelerate, plain
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vlm import VLM
from tests.conformance.published import open_set
from tests.model.conftest import KINDS

PUBLISHED = open_set("MMV_CONFORMANCE_3V", "conformance-3v", "tokenizer-3v")
FOLDER, TOKENIZER, SET, TENSORS = PUBLISHED.folder, PUBLISHED.tokenizer, PUBLISHED.record, PUBLISHED.tensors
CASES = SET["cases"]
ARCHS = PUBLISHED.archs
CONTENTS = ("plain", "think")  # without empty think blocks, and with them
CLOSE = {"atol": 2e-4, "rtol": 0}  # of features and logits
DEVICE = pick_device(os.environ.get("MMV_DEVICE", "cpu"))
PRECISION = os.environ.get("MMV_DTYPE", "float32")
RELATIVE = 1e-3 if PRECISION == "float32" else 2e-2  # of losses and gradient norms
PAD = 0

EACH = pytest.mark.parametrize(("arch", "case", "content"), [(a, c, k) for a in ARCHS for c in CASES for k in CONTENTS])


def load_arch(arch: str) -> VLM:
    """The published tiny model of an architecture, as every command opens it."""
    return load(FOLDER / f"{arch}.pth", FOLDER / "tower", TOKENIZER, str(DEVICE)).model


@pytest.fixture(scope="module")
def models() -> dict[str, VLM]:
    return {arch: load_arch(arch) for arch in ARCHS}


def put(model: VLM, fast: bool) -> VLM:
    return accelerate(model, DEVICE) if fast else plain(model)


def features_of(*cases: str) -> torch.Tensor | None:
    """The published features [M, P, width] of all images of these cases in reading order."""
    images = [image for case in cases for image in CASES[case]["images"]]
    return TENSORS["image_features"][images].to(DEVICE) if images else None


@pytest.mark.parametrize("arch", ARCHS)
def test_sizes_are_read_from_the_file(arch, models):
    published, ours = SET[f"{arch}.config"], models[arch].config
    names = {"n_routed_experts": "num_experts"} if ours.use_moe else {}
    names |= {"aux_loss_alpha": "router_aux_loss_coef", "head_dim": "head_dim"}
    names |= {name: name for name in vars(ours) if name in published and (ours.use_moe or "expert" not in name)}
    assert {name: getattr(ours, name) for name in names} == {name: published[key] for name, key in names.items()}
    assert (ours.qk_norm, ours.n_shared_experts if ours.use_moe else 0) == (True, 0)
    assert models[arch].placeholder_id == SET["image_placeholder_id"]
    assert models[arch].spec.tokens_per_image == SET["tokens_per_image"]


@KINDS
@torch.no_grad()
def test_image_features(fast, models):
    model = put(models[ARCHS[0]], fast)
    features = model.vision_encoder(TENSORS["pixel_values"].to(DEVICE)).cpu()
    torch.testing.assert_close(features, TENSORS["image_features"], **CLOSE)


@KINDS
@EACH
@torch.no_grad()
def test_logits(arch, case, content, fast, models):
    expected, input_ids = (TENSORS[name] for name in (f"{arch}.{case}.{content}.logits_last8",
                                                      f"{case}.{content}.input_ids"))  # fmt: skip
    model = put(models[arch], fast)
    out = model(input_ids[None].to(DEVICE), image_features=features_of(case), logits_to_keep=len(expected))
    torch.testing.assert_close(out.logits[0].cpu(), expected, **CLOSE)


@KINDS
@EACH
def test_loss_without_the_balance_of_experts(arch, case, content, fast, models):
    """As in evaluation: of the balance, the published code returns 0 there."""
    input_ids, labels = (TENSORS[f"{case}.{content}.{name}"][None].to(DEVICE) for name in ("input_ids", "labels"))
    with autocast(DEVICE, PRECISION):
        out = put(models[arch], fast)(input_ids, image_features=features_of(case), labels=labels)
    assert float(out.loss.detach()) == pytest.approx(CASES[case][f"{arch}.{content}.reference_loss"], rel=RELATIVE)
    assert float(out.aux_loss) == CASES[case].get(f"{arch}.{content}.eval_aux_loss", 0.0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_identical(arch, case, models, monkeypatch):
    """The answer after the published prompt, through the engine and its KV cache."""
    model, prompt = models[arch], TENSORS[f"{case}.generation_ids"][None].to(DEVICE)
    expected = CASES[case][f"{arch}.greedy_24"]
    monkeypatch.setattr(prompt_cache, "has_bf16", lambda _: False)  # the published run was one in fp32
    features, image_mask = features_of(case), (prompt[0] == SET["image_placeholder_id"]).tolist()
    images = () if features is None else list(features)
    row = Row(prompt[0].tolist(), Sampler(GREEDY), len(expected), image_mask, images)
    assert list(generate(model, row, eos_id=-1)) == expected  # the published run does not stop early


def published_batch(record: dict, moe: bool) -> Batch:
    """The rows of the published steps, padded; with experts, padding counts as tokens, as it did there."""
    ids, labels = (
        torch.stack([
            F.pad(row, (0, record["padded_to"] - len(row)), value=value)
            for row in (TENSORS[f"{name}.{kind}"] for name in record["batch"])
        ])
        for kind, value in (("input_ids", PAD), ("labels", IGNORE))
    )  # fmt: skip
    lengths = torch.tensor([len(TENSORS[f"{name}.input_ids"]) for name in record["batch"]])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    batch = Batch(ids, torch.ones_like(mask) if moe else mask, labels, ids == SET["image_placeholder_id"])
    cases = [name.rpartition(".")[0] for name in record["batch"]]
    return replace(batch, image_features=features_of(*cases))


@KINDS
@pytest.mark.parametrize("name", [name for name in SET if ".train." in name])
def test_adamw_steps(name, fast, run_over, events, tmp_path):
    """Losses, balance and gradient norms before clipping, through the real loop."""
    record, (arch, _, policy) = SET[name], name.split(".")
    model = load_arch(arch)
    batch = published_batch(record, model.config.use_moe)
    config = RunConfig(
        stage="sft",
        model=model.config,
        data=DataConfig(batch_size=len(batch), workers=0),
        out=tmp_path,
        projector="mlp",
        freeze=policy,
        epochs=record["steps"],
        lr=record["lr0"],
        weight_decay=record["weight_decay"],
        grad_clip=record["grad_clip"],
        dtype="float32",
        device=str(DEVICE),
        save_every=0,
    )
    aux_losses: list[float] = []
    model.register_forward_hook(lambda *call: aux_losses.append(float(call[-1].aux_loss.detach())))
    run = run_over(config, model, [batch])
    put(model, fast)
    assert run.train_step.optimiser.defaults["betas"] == tuple(record["betas"])
    assert run.train_step.optimiser.defaults["eps"] == record["eps"]
    run.run()
    steps = events.steps
    assert [step.lr for step in steps] == pytest.approx(record["lrs"], rel=1e-6)
    assert aux_losses == pytest.approx(record["aux"], rel=RELATIVE)
    losses = [loss + aux for loss, aux in zip(record["losses"], record["aux"], strict=True)]
    assert [step.loss for step in steps] == pytest.approx(losses, rel=RELATIVE)
    assert [step.grad_norm for step in steps] == pytest.approx(record["grad_norms"], rel=RELATIVE)
