"""Every number written down from the published system, made again by this one.

The set is read from a folder (MMV_CONFORMANCE, else `../shared/conformance`), its tokenizer from MMV_TOKENIZER, else
from `tokenizer` beside it, else from the standard place. Nothing here knows a case, a size or an id: another set of the
same format runs unchanged. MMV_DEVICE names a device to compute on, MMV_DTYPE a precision other than fp32.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import fields, replace
from itertools import groupby
from operator import itemgetter

import pytest
import torch
import torch.nn.functional as F

from minimind_v.core.config.freeze import FREEZE_POLICIES
from minimind_v.core.config.schema import DataConfig, RunConfig, TextConfig
from minimind_v.core.data.batch import Batch, collate
from minimind_v.core.data.dataset import Example
from minimind_v.core.data.layouts import ChatML
from minimind_v.core.data.prompt import IMAGE_MARK, PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.device import autocast, pick_device
from minimind_v.core.formats.checkpoint import load_into, read_checkpoint
from minimind_v.core.generate import prompt_cache as ready
from minimind_v.core.generate.rows import Row, generate
from minimind_v.core.generate.sampling import GREEDY, Sampler
from minimind_v.core.model.kernels.accelerate import accelerate, plain
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vision.encoder import VisionSpec
from minimind_v.core.model.vlm import VLM
from tests.conformance.published import open_set
from tests.model.conftest import KINDS

PUBLISHED = open_set("MMV_CONFORMANCE", "conformance", "tokenizer", "MMV_TOKENIZER")
FOLDER, TOKENIZER, SET, TENSORS = PUBLISHED.folder, PUBLISHED.tokenizer, PUBLISHED.record, PUBLISHED.tensors
CASES = SET["cases"]
ARCHS = PUBLISHED.archs
LOGITS = 2e-4  # largest difference of a logit in fp32
DEVICE = pick_device(os.environ.get("MMV_DEVICE", "cpu"))
PRECISION = os.environ.get("MMV_DTYPE", "float32")
RELATIVE = 1e-3 if PRECISION == "float32" else 2e-2  # of losses and gradient norms
PADDED = 640  # length of the published training batch


def named(pattern: str, names: object = TENSORS) -> list[tuple[str, ...]]:
    """The parts of all names of this form; ARCH and CASE in it stand for those of the set."""
    for word, choices in (("ARCH", ARCHS), ("CASE", CASES)):
        pattern = pattern.replace(word, f"({'|'.join(map(re.escape, choices)) or '(?!)'})")
    return [match.groups() for name in names if (match := re.fullmatch(pattern, name))]


def of_cases(pattern: str) -> list[tuple[str, ...]]:
    """(case, parts of the key …) for each key of each case that is of this form."""
    return [(case, *groups) for case, record in CASES.items() for groups in named(pattern, record)]


def test_no_number_is_left_out():
    patterns = [r"image_features", r"CASE\.(input_ids|reference_loss_mask)", r"ARCH\.(?:batch\.)?CASE\.logits_last\d+"]
    left = [name for name in TENSORS if not any(named(pattern, [name]) for pattern in patterns)]
    patterns = [r"conversations|images|prompt|length", r"ARCH\.reference_loss", r"ARCH\.greedy_\d+"]
    left += [
        f"{case}: {key}"
        for case in CASES
        for key in CASES[case]
        if not any(named(pattern, [key]) for pattern in patterns)
    ]
    patterns = [r"seed|image_placeholder_id|tokens_per_image|cases", r"ARCH\.config", r"ARCH\.train\..+"]
    left += [key for key in SET if not any(named(pattern, [key]) for pattern in patterns)]
    if left:
        pytest.skip(f"no test here knows {', '.join(left)}")


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    loaded = Tokenizer.load(TOKENIZER)
    own = loaded.backend.token_to_id(ChatML.placeholder) == SET["image_placeholder_id"]
    return loaded if own else replace(loaded, placeholder_id=SET["image_placeholder_id"])


@pytest.fixture(scope="module")
def encoder(tokenizer) -> PromptEncoder:
    return PromptEncoder(tokenizer, SET["tokens_per_image"])


@pytest.fixture(scope="module")
def examples(encoder) -> dict[str, Example]:
    """Each case as a row of training data."""
    return {
        name: Example(n, name, encoder.row(case["conversations"], len(case.get("images", [])), sys.maxsize))
        for n, (name, case) in enumerate(CASES.items())
    }


@pytest.mark.parametrize(("case", "what"), named(r"CASE\.(input_ids|reference_loss_mask)"))
def test_ids_and_masks_are_identical(case, what, examples):
    tokens = examples[case].tokens
    values = tokens.input_ids if what == "input_ids" else tokens.loss_mask
    assert [int(value) for value in values] == TENSORS[f"{case}.{what}"].tolist()


@pytest.mark.parametrize("case", [case for (case,) in of_cases("length")])
def test_length(case, examples):
    assert len(examples[case].tokens) == CASES[case]["length"]


@pytest.mark.parametrize("case", [case for (case,) in of_cases("prompt")])
def test_rendered_prompt(case, examples, tokenizer):
    """What the model reads, turned back to text with every picture as its mark, is the published rendering."""
    tokens, text = examples[case].tokens, ""
    for patch, group in groupby(zip(tokens.image_mask, tokens.input_ids, strict=True), key=itemgetter(0)):
        ids = [token for _, token in group]
        if patch:
            assert len(ids) % SET["tokens_per_image"] == 0
            text += IMAGE_MARK * (len(ids) // SET["tokens_per_image"])
        else:
            text += tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert text == CASES[case]["prompt"]


# --- model ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load_arch():
    """Builds the published tiny model of an architecture, in fp32."""
    names = {item.name for item in fields(TextConfig)}

    def load(arch: str) -> VLM:
        config = TextConfig(**{key: value for key, value in SET[f"{arch}.config"].items() if key in names})
        checkpoint = read_checkpoint(FOLDER / f"{arch}.pth")
        # Features are given, so of the vision tower only their width matters.
        spec = VisionSpec(image_size=1, patch_size=1, width=checkpoint.vision_width or 1)
        model = VLM(config, spec, SET["image_placeholder_id"])
        load_into(model, checkpoint, new_projector=checkpoint.vision_width is None)
        return model.to(DEVICE).eval()

    return load


@pytest.fixture(scope="module")
def models(load_arch) -> dict[str, VLM]:
    return {arch: load_arch(arch) for arch in ARCHS}


def features_of(*cases: str) -> torch.Tensor | None:
    """What stands in for CLIP's output: [M, P, width] for all pictures of these cases in reading order."""
    pictures = [picture for case in cases for picture in CASES[case].get("images", [])]
    return TENSORS["image_features"][pictures].float() if pictures else None


def make_batch(examples: dict[str, Example], cases: tuple[str, ...], pad_id: int, length: int = 0) -> Batch:
    """The cases side by side, padded to the longest of them or to `length`."""
    batch = collate([examples[case] for case in cases], [], pad_id)
    more = (0, max(0, length - batch.input_ids.shape[1]))
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, more, value=pad_id),
        attention_mask=F.pad(batch.attention_mask, more),
        labels=F.pad(batch.labels, more, value=IGNORE),
        image_mask=F.pad(batch.image_mask, more),
        image_features=features_of(*cases),
    )


def inputs_of(batch: Batch) -> dict[str, torch.Tensor | None]:
    names, batch = ("input_ids", "attention_mask", "image_features", "image_mask"), batch.to(DEVICE)
    return {name: getattr(batch, name) for name in names}


@pytest.mark.parametrize(("arch", "case", "name"), named(r"ARCH\.CASE\.(logits_last\d+)"))
@torch.no_grad()
def test_logits(arch, case, name, models, examples, tokenizer):
    expected = TENSORS[f"{arch}.{case}.{name}"]
    batch = make_batch(examples, (case,), tokenizer.pad_id)
    logits = models[arch](**inputs_of(batch), logits_to_keep=len(expected)).logits[0].cpu()
    torch.testing.assert_close(logits, expected, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("arch", sorted({arch for arch, _, _ in named(r"ARCH\.batch\.CASE\.(logits_last\d+)")}))
@torch.no_grad()
def test_logits_of_the_padded_batch(arch, models, examples, tokenizer):
    keys = {case: name for of_arch, case, name in named(r"ARCH\.batch\.CASE\.(logits_last\d+)") if of_arch == arch}
    cases = tuple(case for case in CASES if case in keys)
    longest = max(len(examples[case].tokens) for case in cases)
    batch = make_batch(examples, cases, tokenizer.pad_id, longest + 3)  # so that even the longest row has padding
    logits = models[arch](**inputs_of(batch)).logits.cpu()
    for row, case in enumerate(cases):
        expected, end = TENSORS[f"{arch}.batch.{case}.{keys[case]}"], len(examples[case].tokens)
        torch.testing.assert_close(logits[row, end - len(expected) : end], expected, atol=LOGITS, rtol=0)


@KINDS
@pytest.mark.parametrize(("case", "arch"), of_cases(r"ARCH\.reference_loss"))
def test_loss(case, arch, fast, models, examples, tokenizer):
    """The mean over supervised tokens; the published number is without the experts' auxiliary loss."""
    batch = make_batch(examples, (case,), tokenizer.pad_id)
    model = accelerate(models[arch], DEVICE) if fast else plain(models[arch])
    with autocast(DEVICE, PRECISION):
        out = model(**inputs_of(batch), labels=batch.labels.to(DEVICE))
    assert float(out.loss) == pytest.approx(CASES[case][f"{arch}.reference_loss"], rel=RELATIVE)


@pytest.mark.parametrize(("case", "arch", "name"), of_cases(r"ARCH\.(greedy_\d+)"))
def test_greedy_tokens_are_identical(case, arch, name, models, encoder, monkeypatch):
    """The answer to the last question, through the engine and its KV cache."""
    expected, messages = CASES[case][f"{arch}.{name}"], CASES[case]["conversations"]
    tokens = encoder.prompt(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    model = models[arch]
    monkeypatch.setattr(ready, "has_bf16", lambda _: False)  # the published run was one in fp32
    features = features_of(case)
    images = () if features is None else list(features)
    row = Row(tokens.input_ids, Sampler(GREEDY), len(expected), tokens.image_mask, images)
    assert list(generate(model, row, eos_id=-1)) == expected  # the published run does not stop early


# --- training ---------------------------------------------------------------------------------------------------------


def policy_of(name: str) -> str:
    """Our word for a published freeze policy: `projector_only` is `projector`, `projector_last` is `projector+last`."""
    ours = name.removesuffix("_only").replace("_", "+")
    assert ours in FREEZE_POLICIES, f"no freeze policy here is the published {name!r}"
    return ours


@KINDS
@pytest.mark.parametrize(("arch", "policy"), named(r"ARCH\.train\.(.+)", SET))
def test_adamw_steps(arch, policy, fast, load_arch, examples, tokenizer, run_over, events, tmp_path):
    """Losses and gradient norms before clipping, through the real loop: freezing, schedule, clipping, optimiser."""
    record = SET[f"{arch}.train.{policy}"]
    batch = make_batch(examples, tuple(record["batch"]), tokenizer.pad_id, PADDED)
    model = load_arch(arch)
    if model.config.use_moe:  # the published auxiliary loss counts padding too
        batch = replace(batch, attention_mask=torch.ones_like(batch.attention_mask))
    config = RunConfig(
        stage="sft",
        model=model.config,
        data=DataConfig(batch_size=len(batch), workers=0),
        out=tmp_path,
        freeze=policy_of(policy),
        epochs=record["steps"],
        lr=record["lr0"],
        weight_decay=record["weight_decay"],
        grad_clip=record["grad_clip"],
        dtype="float32",
        device=str(DEVICE),
        save_every=0,
    )
    run = run_over(config, model, [batch])
    accelerate(model, DEVICE) if fast else plain(model)
    assert run.train_step.optimiser.defaults["betas"] == tuple(record["betas"])
    assert run.train_step.optimiser.defaults["eps"] == record["eps"]
    run.run()
    steps = events.steps
    assert [step.loss for step in steps] == pytest.approx(record["losses"], rel=RELATIVE)
    assert [step.grad_norm for step in steps] == pytest.approx(record["grad_norms"], rel=RELATIVE)
