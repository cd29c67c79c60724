"""Are the two GGUF files the same as their source? Read back, and where it is installed llama.cpp itself is asked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minimind_v.core.data.images import to_pixels
from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.errors import RunError
from minimind_v.core.export.cases import CASES, Case, pictures
from minimind_v.core.export.gguf import DEFAULT
from minimind_v.core.export.order import Order
from minimind_v.core.export.report import Report, size_of
from minimind_v.core.generate.load import Loaded, load_model
from minimind_v.core.gguf.vision import without_corner

# How far a number of a matrix may be off, as a share of the largest in it: half a step of the coarsest block.
STEP = {
    "f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 250,
    "q5_1": 1 / 30, "q5_0": 1 / 15, "q4_1": 1 / 14, "q4_0": 1 / 7,
}  # fmt: skip
# Below eight bits answers change, and how much is told, not judged. Above, llama.cpp's own half precision (of keys,
# values, activations and its table of GELU) may cost so much of the largest logit, or feature.
ALLOWED = {"f32": 0.03, "f16": 0.03, "bf16": 0.08, "q8_0": 0.08}
TEXTS = (
    "Hello, world! Don't you'll IT'S  two  spaces\n\n\ttabs 12345 3.14",
    "请描述这张图片里的内容：一只猫，２０２４年。日本語、한국어。",
    "🙂👨‍👩‍👧 é ﬁ ½ \u00a0\u3000 user@example.com @@@@",
    "def f(x):\n    return x[0] @ {'a': 1}  # <|im_end|>",
)


def verify(order: Order, folder: Path) -> Report:
    """Compare the files with their source: sizes, weights, token ids, logits, greedy tokens.

    Raises RunError where llama.cpp is installed and does not open them at all.
    """
    quantize = order.quantize or DEFAULT
    loaded, again = order.load(), load_model(folder, device="cpu")
    report = Report()
    same = again.model.config == loaded.model.config
    report.add("sizes", "the same" if same else f"{again.model.config}, not {loaded.model.config}", same)
    if not same:
        return report
    _compare_weights(report, loaded, again, STEP[quantize])
    _compare_ids(report, loaded, [again.tokenizer.encode(text).ids for text in TEXTS])
    if importlib.util.find_spec("llama_cpp") is None:
        report.add("opened by", "our own reader; llama.cpp is asked as well where llama-cpp-python is installed")
        _compare_read_back(report, loaded, again)
    else:
        with tempfile.TemporaryDirectory(prefix="mmv-verify-") as work:
            _compare_llama(report, loaded, _ask(folder, Path(work), loaded.model.spec.image_size), quantize)
    report.add("size", f"{size_of(folder):,} bytes; the source has {size_of(order.model):,}")
    return report


def _compare_weights(report: Report, loaded: Loaded, again: Loaded, step: float) -> None:
    ours = {
        name: tensor for name, tensor in loaded.model.state_dict().items() if not name.startswith("vision_encoder.")
    }
    theirs = again.model.state_dict()
    worst = max(
        float((theirs[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30))
        for name, tensor in ours.items()
    )
    report.add("weights", f"at most {worst:.1g} of the largest apart (allowed {step:.1g})", worst <= step * 1.02)
    seen, again_seen = (
        model.model.vision_encoder(_pixels(0, model.model.spec.image_size)[None])  # type: ignore[misc]
        for model in (loaded, again)
    )
    alike = float(torch.cosine_similarity(seen, again_seen, dim=-1).min())
    report.add("vision tower", f"features at least {alike:.5f} alike", alike > 0.98)


def _compare_ids(report: Report, loaded: Loaded, found: list[list[int]]) -> None:
    same = sum(loaded.tokenizer.encode(text).ids == ids for text, ids in zip(TEXTS, found, strict=True))
    report.add("token ids", f"the same in {same} of {len(TEXTS)} texts", same == len(TEXTS))


def _compare_read_back(report: Report, loaded: Loaded, again: Loaded) -> None:
    difference = scale = 0.0
    for case in CASES:
        ours, theirs = (_think(model, case, [], corner=True) for model in (loaded, again))
        difference = max(difference, float((ours - theirs).abs().max()))
        scale = max(scale, float(ours.abs().max()))
    report.add("largest logit difference", f"{difference:.1e} of {scale:.1f}, what the types cost")


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def _ask(folder: Path, work: Path, size: int) -> dict[str, np.ndarray]:
    """What llama.cpp answers, from a process of its own. It is shown the pixels that ours sees: it crops otherwise."""
    for number in range(len(pictures())):
        square = _pixels(number, size).numpy().transpose(1, 2, 0)
        Image.fromarray(square).save(work / f"{number}.png")
    cases = [{"messages": case.standard, "pictures": [f"{n}.png" for n in case.pictures]} for case in CASES]
    (work / "cases.json").write_text(json.dumps({"cases": cases, "texts": TEXTS}), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "minimind_v.core.export.probe_llama", str(folder), str(work)],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RunError(f"llama.cpp does not open what was written ({reason:.300}); nothing is left of it")
    with np.load(work / "answers.npz") as found:
        return dict(found)


def _compare_llama(report: Report, loaded: Loaded, found: dict[str, np.ndarray], quantize: str) -> None:
    report.add("opened by", f"llama.cpp ({_version()})")
    _compare_ids(report, loaded, [found[f"text{number}"].tolist() for number in range(len(TEXTS))])
    prompts = sum(
        _as_asked(_encode(loaded, case)) == found[f"ids{number}"].tolist() for number, case in enumerate(CASES)
    )
    report.add("prompts", f"the same in {prompts} of {len(CASES)}", prompts == len(CASES))
    if report.wrong:
        return
    given = logits = whole = likely = count = 0.0
    for number, case in enumerate(CASES):
        said, theirs = found[f"said{number}"].tolist(), torch.from_numpy(found[f"logits{number}"])
        if case.pictures:
            ours = _given(loaded, case)
            given = max(given, _apart(ours, torch.from_numpy(found[f"given{number}"])))
        ours = _think(loaded, case, said, corner=False)
        logits = max(logits, _apart(ours, theirs))
        ours = _think(loaded, case, said, corner=True)
        whole = max(whole, _apart(ours, theirs))
        likely += float((ours.argmax(-1) == torch.tensor(said)).sum())
        count += len(said)
    allowed = ALLOWED.get(quantize, float("inf"))
    report.add("picture features", f"at most {given:.2%} of the largest apart", given <= allowed)
    report.add("logits", f"at most {logits:.2%} of the largest apart", logits <= allowed)
    report.add("the corner costs", f"logits {whole:.1%} apart with the patch that llama.cpp does not see")
    report.add("greedy tokens", f"{likely:.0f} of {count:.0f} the same, the corner included")


def _version() -> str:
    from importlib.metadata import version

    return f"llama-cpp-python {version('llama-cpp-python')}"


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max())


def _encode(loaded: Loaded, case: Case) -> Tokens:
    return PromptEncoder(loaded.tokenizer, loaded.model.spec.tokens_per_image).prompt(case.conversations)


def _as_asked(tokens: Tokens) -> list[int]:
    return [-1 if patch else id for id, patch in zip(tokens.input_ids, tokens.image_mask, strict=True)]


def _pixels(number: int, size: int) -> Tensor:
    return torch.from_numpy(to_pixels(pictures()[number], size))


@torch.inference_mode()
def _features(loaded: Loaded, case: Case, corner: bool) -> Tensor | None:
    encoder = loaded.model.vision_encoder
    assert encoder is not None
    if not case.pictures:
        return None
    pixels = torch.stack([_pixels(number, encoder.spec.image_size) for number in case.pictures])
    return encoder(pixels) if corner else without_corner(encoder, pixels)


def _given(loaded: Loaded, case: Case) -> Tensor:
    """What the language model is given for the pictures, without the corner: [M·P, hidden]."""
    features = _features(loaded, case, corner=False)
    with torch.inference_mode():
        return loaded.model.vision_proj(features).flatten(0, 1)


@torch.inference_mode()
def _think(loaded: Loaded, case: Case, said: list[int], corner: bool) -> Tensor:
    """The logits of each token said behind the prompt [N, V]; of the prompt's own without any."""
    tokens = _encode(loaded, case)
    ids = torch.tensor([tokens.input_ids + said])
    mask = torch.tensor([tokens.image_mask + [False] * len(said)])
    logits = loaded.model(ids, image_features=_features(loaded, case, corner), image_mask=mask).logits
    assert logits is not None
    return logits[0, -len(said) - 1 : -1] if said else logits[0]
