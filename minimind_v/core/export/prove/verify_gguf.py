"""Verify the GGUF files of an export: read them back, and compare llama.cpp's answers if it is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minimind_v.core.data.images import to_pixels
from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.errors import RunError
from minimind_v.core.export.prove.cases import CASES, Case, images
from minimind_v.core.export.prove.report import Report
from minimind_v.core.files import size_of
from minimind_v.core.formats.gguf import language, vision
from minimind_v.core.formats.gguf.file import QUANTIZATIONS, Reader
from minimind_v.core.formats.gguf.read import MMPROJ, MODEL
from minimind_v.core.formats.gguf.tokenizer import read_tokenizer
from minimind_v.core.formats.gguf.write import DEFAULT, holds_images
from minimind_v.core.formats.load import LoadedModel
from minimind_v.core.formats.request import ExportRequest

# The largest error of a number in a matrix, as a share of its largest number: half a step of the coarsest block.
STEP = {
    "f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 220,
    "q5_1": 1 / 30, "q5_0": 1 / 15, "q4_1": 1 / 14, "q4_0": 1 / 7,
}  # fmt: skip
# The largest median error that llama.cpp's half precision (activations, keys, values, its table of GELU) may cause, as
# a share of the largest logit or feature. A median, because a near tie between two experts may change single answers
# completely. A wrong conversion is wrong by 1. Below eight bits the answers change: reported, not judged.
ALLOWED = {"f32": 0.05, "f16": 0.05, "bf16": 0.2, "q8_0": 0.2}
TEXTS = (
    "Hello, world! Don't you'll IT'S  two  spaces\n\n\ttabs 12345 3.14",
    "请描述这张图片里的内容：一只猫，２０２４年。日本語、한국어。",
    "🙂👨‍👩‍👧 é ﬁ ½ \u00a0\u3000 user@example.com @@@@",
    "def f(x):\n    return x[0] @ {'a': 1}  # <|im_end|>",
)


def verify(loaded: LoadedModel, folder: Path, order: ExportRequest) -> Report:
    """Compare the files with their source: sizes, weights, token ids, logits, greedy tokens.

    It overwrites `loaded`. Raises RunError where llama.cpp is installed and cannot open them.
    """
    quantize, report = order.quantize or DEFAULT, Report()
    loaded.checkpoint.tensors.clear()  # the model has them
    config = language.read_config(Reader(folder / MODEL))
    same = config == loaded.model.config
    report.add("sizes", "the same" if same else f"{config}, not {loaded.model.config}", same)
    if same:
        _compare_weights(report, loaded, folder, quantize)
        tokenizer = read_tokenizer(Reader(folder / MODEL))
        _compare_ids(report, loaded, [tokenizer.encode(text).ids for text in TEXTS])
    if report.wrong:
        return report
    if not _llama_is_installed():
        _compare_read_back(report, loaded, folder)
    else:
        with tempfile.TemporaryDirectory(prefix="mmv-verify-") as work:
            _compare_llama(report, loaded, _ask(folder, Path(work), loaded), quantize)
    report.add("size", f"{size_of(folder):,} bytes; the source has {size_of(order.model):,}")
    return report


def _compare_weights(report: Report, loaded: LoadedModel, folder: Path, quantize: str) -> None:
    """One file after the other, so that both are never in memory together."""
    ours, config = loaded.model.state_dict(), loaded.model.config
    worst = _worst(ours, language.read_tensors(Reader(folder / MODEL), config).items())
    mmproj = Reader(folder / MMPROJ) if holds_images(loaded.config) else None
    if mmproj:
        worst = max(worst, _worst(ours, vision.read_projector(mmproj).items()))
    report.add("weights", f"largest difference {worst:.1g} of the largest value", worst <= STEP[quantize] * 1.02)
    if mmproj:
        assert loaded.model.vision_encoder is not None
        tower, step = vision.tower_tensors(loaded.model.vision_encoder), STEP[QUANTIZATIONS[quantize]]
        worst = _worst(tower, vision.read_tower(mmproj))
        report.add("vision tower", f"largest difference {worst:.1g} of the largest value", worst <= step * 1.02 + 1e-6)


def _worst(ours: dict[str, Tensor], theirs: Iterable[tuple[str, Tensor]]) -> float:
    """The largest difference of tensors by name, as a share of the largest number of each."""
    return max(_apart(ours[name], tensor) for name, tensor in theirs)


def _cases(loaded: LoadedModel) -> list[Case]:
    """The prompts that the export can answer."""
    return [case for case in CASES if not case.images or holds_images(loaded.config)]


def _compare_ids(report: Report, loaded: LoadedModel, theirs: list[list[int]]) -> None:
    same = sum(loaded.tokenizer.encode(text).ids == ids for text, ids in zip(TEXTS, theirs, strict=True))
    report.add("token ids", f"equal in {same} of {len(TEXTS)} texts", same == len(TEXTS))


def _compare_read_back(report: Report, loaded: LoadedModel, folder: Path) -> None:
    report.add("opened by", "mmv's own reader (install llama-cpp-python to compare llama.cpp too)")
    ours = [_logits(loaded, case, [], _features(loaded, case)) for case in _cases(loaded)]
    _take_weights(loaded, folder)
    theirs = [_logits(loaded, case, [], _features(loaded, case)) for case in _cases(loaded)]
    report.add("logits", f"largest difference {max(map(_apart, ours, theirs)):.2%} of the largest logit (measured)")


@torch.no_grad()
def _take_weights(loaded: LoadedModel, folder: Path) -> None:
    """Replace the source's weights by the files': no second model is in memory."""
    ours = loaded.model.state_dict()
    for name, tensor in language.read_tensors(Reader(folder / MODEL), loaded.model.config).items():
        ours[name].copy_(tensor)
    if not holds_images(loaded.config):
        return
    assert loaded.model.vision_encoder is not None
    mmproj, tower = Reader(folder / MMPROJ), loaded.model.vision_encoder.tower.state_dict()
    for name, tensor in vision.read_projector(mmproj).items():
        ours[name].copy_(tensor)
    for name, tensor in vision.read_tower(mmproj):
        tower[name].copy_(tensor)


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def _llama_is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def _ask(folder: Path, work: Path, loaded: LoadedModel) -> dict[str, np.ndarray]:
    """The answers of llama.cpp in a separate process, to square images with our pixels: llama.cpp crops otherwise."""
    for number in range(len(images())):
        square = _pixels(number, loaded.model.spec.image_size).numpy().transpose(1, 2, 0)
        Image.fromarray(square).save(work / f"{number}.png")
    cases = [{"messages": case.standard, "pictures": [f"{n}.png" for n in case.images]} for case in _cases(loaded)]
    (work / "cases.json").write_text(json.dumps({"cases": cases, "texts": TEXTS}), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "minimind_v.core.export.prove.ask_llama", str(folder), str(work)],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RunError(f"llama.cpp could not open the export ({reason:.300}); the export was removed")
    with np.load(work / "answers.npz") as answers:
        return dict(answers)


def _compare_llama(report: Report, loaded: LoadedModel, answers: dict[str, np.ndarray], quantize: str) -> None:
    report.add("opened by", f"llama.cpp ({_version()})")
    _compare_ids(report, loaded, [answers[f"text{number}"].tolist() for number in range(len(TEXTS))])
    cases = _cases(loaded)
    prompts = sum(_ids(_encode(loaded, case)) == answers[f"ids{number}"].tolist() for number, case in enumerate(cases))
    report.add("prompts", f"equal in {prompts} of {len(cases)}", prompts == len(cases))
    if report.wrong:
        return
    projected: list[float] = []
    logits: list[float] = []
    whole: list[float] = []
    likely: list[bool] = []
    for number, case in enumerate(cases):
        tokens, theirs = answers[f"tokens{number}"].tolist(), torch.from_numpy(answers[f"logits{number}"])
        features = _features(loaded, case, corner=False)
        if features is not None:
            with torch.inference_mode():
                ours = loaded.model.vision_proj(features).flatten(0, 1)  # [M·P, hidden]
            projected += _each_apart(ours, torch.from_numpy(answers[f"features{number}"]))
        logits += _each_apart(_logits(loaded, case, tokens, features), theirs)
        ours = _logits(loaded, case, tokens, _features(loaded, case))
        whole += _each_apart(ours, theirs)
        likely += (ours.argmax(-1) == torch.tensor(tokens)).tolist()
    allowed = ALLOWED.get(quantize, float("inf"))
    for name, apart in (("image features", projected), ("logits", logits)):
        if apart:
            finding = f"{median(apart):.2%} of the largest value: median difference; largest {max(apart):.2%}"
            report.add(name, finding, median(apart) <= allowed)
    if projected:
        report.add("corner patch", f"missing in llama.cpp; it changes the logits by {median(whole):.2%} (median)")
    source = "the source, which has the corner patch" if projected else "the source"
    report.add("greedy tokens", f"{sum(likely)} of {len(likely)} equal to {source}")


def _version() -> str:
    from importlib.metadata import version

    return f"llama-cpp-python {version('llama-cpp-python')}"


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest number of ours."""
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30))


def _each_apart(ours: Tensor, theirs: Tensor) -> list[float]:
    """The largest difference in each row [N, …], as a share of the largest number of ours."""
    return ((ours - theirs).abs().amax(-1) / ours.abs().max()).tolist()


def _encode(loaded: LoadedModel, case: Case) -> Tokens:
    return PromptEncoder(loaded.tokenizer, loaded.model.spec.tokens_per_image).prompt(case.conversations)


def _ids(tokens: Tokens) -> list[int]:
    """The ids, -1 for each position of an image."""
    return [-1 if patch else id for id, patch in zip(tokens.input_ids, tokens.image_mask, strict=True)]


def _pixels(number: int, size: int) -> Tensor:
    return torch.from_numpy(to_pixels(images()[number], size).copy())


@torch.inference_mode()
def _features(loaded: LoadedModel, case: Case, corner: bool = True) -> Tensor | None:
    encoder = loaded.model.vision_encoder
    assert encoder is not None
    if not case.images:
        return None
    pixels = torch.stack([_pixels(number, encoder.spec.image_size) for number in case.images])
    return encoder(pixels) if corner else vision.without_corner(encoder, pixels)


@torch.inference_mode()
def _logits(loaded: LoadedModel, case: Case, answer: list[int], features: Tensor | None) -> Tensor:
    """The logits of each token of an answer [N, V]; without one, those of the prompt's tokens."""
    tokens = _encode(loaded, case)
    ids = torch.tensor([tokens.input_ids + answer])
    mask = torch.tensor([tokens.image_mask + [False] * len(answer)])
    logits = loaded.model(ids, image_features=features, image_mask=mask).logits
    assert logits is not None
    return logits[0, -len(answer) - 1 : -1] if answer else logits[0]
