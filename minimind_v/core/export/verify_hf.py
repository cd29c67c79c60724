"""Is an exported folder the same as its source? Asked of stock transformers in a fresh process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_v.core.data.images import load_pixels
from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.errors import RunError
from minimind_v.core.export.cases import CASES, Case, pictures
from minimind_v.core.export.order import Order
from minimind_v.core.export.report import Report, size_of
from minimind_v.core.generate.load import Loaded

TOLERANCE = 1e-4  # of a logit in fp32; what rounding alone does is near 1e-6


def verify(order: Order, folder: Path) -> Report:
    """Compare `folder` with its source on fixed prompts and pictures: ids, pixels, logits, greedy tokens.

    An export in another type is compared with the source's weights in that type, which must give the same; what the
    type itself costs is told beside. Raises RunError where the folder cannot be opened at all.
    """
    with tempfile.TemporaryDirectory(prefix="mmv-verify-") as work:
        found = _ask(folder, Path(work))
        return _compare(order, folder, found)


def _ask(folder: Path, work: Path) -> dict[str, Any]:
    """What the folder answers, from a process that has nothing of ours in it."""
    for number, picture in enumerate(pictures()):
        picture.save(work / f"{number}.png")
    cases = [{"messages": case.standard, "pictures": [f"{number}.png" for number in case.pictures]} for case in CASES]
    (work / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    offline = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "minimind_v.core.export.probe", str(folder), str(work)],
        capture_output=True, text=True, env=offline, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RunError(f"transformers does not open what was written ({reason:.300}); nothing is left of it")
    return torch.load(work / "answers.pt", weights_only=True)


@dataclass
class Answer:
    """What the source makes of a case, with what the export said behind the prompt."""

    tokens: Tokens
    pixels: Tensor | None  # [M, 3, S, S], normalised
    logits: Tensor  # [T + N, V]


def _compare(order: Order, folder: Path, found: dict[str, Any]) -> Report:
    loaded = order.load()
    lossy = order.dtype in ("float16", "bfloat16")
    exact = _answer_all(loaded, found) if lossy else None
    if lossy:
        loaded.model.to(getattr(torch, order.dtype)).float()  # type: ignore[arg-type]
    ours, theirs = _answer_all(loaded, found), found["answers"]
    report = Report()
    report.add("opened by", f"transformers, {found['class']}, without remote code")
    _compare_inputs(report, loaded, ours, theirs)
    if report.wrong:
        return report
    difference = _largest(ours, theirs)
    report.add("largest logit difference", f"{difference:.1e} (allowed {TOLERANCE:.0e})", difference <= TOLERANCE)
    if exact:
        report.add(f"what {order.dtype} costs", f"{_largest(exact, theirs):.1e} of a logit")
    said = [_likeliest(our, their["said"]) for our, their in zip(ours, theirs, strict=True)]
    same, count = sum(int(row.sum()) for row in said), sum(len(row) for row in said)
    report.add("greedy tokens", f"{same} of {count} the same", same == count)
    report.add("parameters", f"{found['parameters']:,}, vision tower included")
    report.add("size", f"{size_of(folder):,} bytes; the source has {size_of(order.model):,}")
    return report


def _answer_all(loaded: Loaded, found: dict[str, Any]) -> list[Answer]:
    return [_answer(loaded, case, answer["said"]) for case, answer in zip(CASES, found["answers"], strict=True)]


@torch.inference_mode()
def _answer(loaded: Loaded, case: Case, said: Tensor) -> Answer:
    model = loaded.model
    tokens = PromptEncoder(loaded.tokenizer, model.spec.tokens_per_image).prompt(case.conversations)
    seen = [_as_seen(number, model.spec.image_size) for number in case.pictures]
    pixels = torch.stack(seen) if seen else None
    known = said.clamp(max=model.config.vocab_size - 1)
    ids = torch.cat((torch.tensor(tokens.input_ids), known))[None]
    mask = torch.tensor([tokens.image_mask + [False] * len(said)])
    logits = model(ids, pixel_values=pixels, image_mask=mask).logits
    assert logits is not None
    encoder = model.vision_encoder
    assert encoder is not None
    normal = None if pixels is None else (pixels.float() / 255 - encoder.mean) / encoder.std
    return Answer(tokens, normal, logits[0])


def _as_seen(number: int, size: int) -> Tensor:
    buffer = io.BytesIO()
    pictures()[number].save(buffer, "png")
    return torch.from_numpy(load_pixels(buffer.getvalue(), f"picture {number}", size))


def _compare_inputs(report: Report, loaded: Loaded, ours: list[Answer], theirs: list[dict[str, Any]]) -> None:
    image_id, std = loaded.checkpoint.config.vocab_size, max(loaded.model.spec.std)
    same, levels = 0, 0.0
    for our, their in zip(ours, theirs, strict=True):
        ids = torch.tensor(our.tokens.input_ids).masked_fill(torch.tensor(our.tokens.image_mask), image_id)
        same += torch.equal(ids, their["input_ids"])
        if our.pixels is not None and their["pixel_values"] is not None:
            levels = max(levels, float((our.pixels - their["pixel_values"]).abs().max()) * std * 255)
    report.add("token ids", f"the same in {same} of {len(ours)} prompts", same == len(ours))
    report.add("pixels", f"at most {levels:.2g} of 255 grey levels apart", levels <= 1.01)


def _largest(ours: list[Answer], theirs: list[dict[str, Any]]) -> float:
    """The largest difference of a logit; the image token's, which we have not, must not be looked at."""
    return max(
        float((our.logits[: len(their["logits"])] - their["logits"][:, : our.logits.shape[1]]).abs().max())
        for our, their in zip(ours, theirs, strict=True)
    )


def _likeliest(our: Answer, said: Tensor) -> Tensor:
    """For each token that the export said, whether the source finds none likelier by more than the tolerance."""
    before = our.logits[len(our.logits) - len(said) - 1 : -1]  # [N, V]
    return before.max(-1).values - before.gather(1, said.clamp(max=before.shape[1] - 1)[:, None])[:, 0] <= TOLERANCE
