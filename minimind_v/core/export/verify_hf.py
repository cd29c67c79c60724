"""Is an exported folder the same as its source? Asked of stock transformers in a fresh process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_v.core.data.images import load_pixels
from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.errors import RunError
from minimind_v.core.export.cases import CASES, Case, pictures
from minimind_v.core.export.order import Order
from minimind_v.core.export.report import Report, Verify, size_of
from minimind_v.core.generate.load import Loaded

TOLERANCE = 1e-4  # of a logit in fp32; what rounding alone does is near 1e-6


@contextmanager
def verifier() -> Iterator[Verify]:
    """Gives the function that verifies. The other process starts at once: a third of the time goes into its imports."""
    with tempfile.TemporaryDirectory(prefix="mmv-verify-") as work, _Probe(Path(work)) as probe:

        def verify(loaded: Loaded, folder: Path, order: Order) -> Report:
            return _verify(probe, loaded, folder, order)

        yield verify


def _verify(probe: _Probe, loaded: Loaded, folder: Path, order: Order) -> Report:
    """Compare `folder` with its source on fixed prompts and pictures: ids, pixels, logits, greedy tokens.

    An export in another type is compared with the source's weights in that type, which must give the same; what the
    type itself costs is told beside. Raises RunError where the folder cannot be opened at all.
    """
    probe.ask(folder, "float32")
    reader = _Reader(loaded)
    found = probe.answers()
    lossy = order.dtype in ("float16", "bfloat16")
    cost = _largest(reader.think(found), found) if lossy else None
    if lossy:
        for parameter in loaded.model.parameters():  # and no buffers: these no file has
            parameter.data = parameter.to(getattr(torch, str(order.dtype))).float()
        reader = _Reader(loaded)
    report = Report()
    report.add("opened by", f"transformers, {found['class']}, without remote code")
    if not _compare_inputs(report, loaded, reader, found):
        return report
    precision, thought = "fp32", reader.think(found)
    if _largest(thought, found) > TOLERANCE and loaded.checkpoint.config.use_moe:
        # Two experts as good as each other: rounding chose between them, and finer numbers choose the same.
        loaded.model.double()
        probe.ask(folder, "float64")
        precision, reader = "fp64", _Reader(loaded)
        found = probe.answers()
        thought = reader.think(found)
    difference = _largest(thought, found)
    report.add(
        "largest logit difference",
        f"{difference:.1e} in {precision} (allowed {TOLERANCE:.0e})",
        difference <= TOLERANCE,
    )
    if cost is not None:
        report.add(f"cost of {order.dtype}", f"{cost:.1e} of a logit")
    same, count = _count_likeliest(thought, found)
    report.add("greedy tokens", f"{same} of {count} the same", same == count)
    report.add("parameters", f"{found['parameters']:,}, vision tower included")
    report.add("size", f"{size_of(folder):,} bytes; the source has {size_of(order.model):,}")
    return report


class _Probe:
    """The other process (`probe.py`): asked about a folder, it answers when it is ready."""

    def __init__(self, work: Path) -> None:
        self.work = work
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self.errors = (work / "stderr").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minimind_v.core.export.probe"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=os.environ | quiet,
        )  # fmt: skip

    def __enter__(self) -> _Probe:
        for number, picture in enumerate(pictures()):
            picture.save(self._picture(number))
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def _picture(self, number: int) -> str:
        return str(self.work / f"{number}.png")

    def ask(self, folder: Path, dtype: str) -> None:
        cases = [{"messages": case.standard, "pictures": [*map(self._picture, case.pictures)]} for case in CASES]
        request = {"folder": str(folder), "cases": cases, "dtype": dtype, "answers": str(self.work / "answers.pt")}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def answers(self) -> dict[str, Any]:
        """Wait for what the folder answers. Raises RunError where it cannot be opened."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "done\n":
            self._fail()
        return torch.load(self.work / "answers.pt", weights_only=True)

    def _fail(self) -> None:
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip() or f"exit code {code}"
        raise RunError(f"transformers does not open what was written ({said.splitlines()[-1]:.300}); nothing is left")


class _Reader:
    """The source reads the cases: ids, pixels, and the features of these, which need not wait for the other process."""

    @torch.inference_mode()
    def __init__(self, loaded: Loaded) -> None:
        self.model = loaded.model
        encoder = loaded.model.vision_encoder
        assert encoder is not None
        prompts = PromptEncoder(loaded.tokenizer, encoder.spec.tokens_per_image)
        self.tokens = [prompts.prompt(case.conversations) for case in CASES]
        seen = [_as_seen(picture, encoder.spec.image_size) for picture in pictures()]
        self.pixels = [(picture.float() / 255 - encoder.mean) / encoder.std for picture in seen]
        features = encoder(torch.stack(self.pixels))  # [M, P, width]
        self.features = [features[list(case.pictures)] if case.pictures else None for case in CASES]

    def pixels_of(self, case: Case) -> Tensor | None:
        return torch.stack([self.pixels[number] for number in case.pictures]) if case.pictures else None

    @torch.inference_mode()
    def think(self, found: dict[str, Any]) -> list[Tensor]:
        """For each case the logits [N, V] before each of the N tokens that the export said."""
        return [
            self._before(tokens, features, answer["said"])
            for tokens, features, answer in zip(self.tokens, self.features, found["answers"], strict=True)
        ]

    def _before(self, tokens: Tokens, features: Tensor | None, said: Tensor) -> Tensor:
        known = said[:-1].clamp(max=self.model.config.vocab_size - 1)
        ids = torch.cat((torch.tensor(tokens.input_ids), known))[None]  # [1, T + N - 1]
        mask = torch.tensor([tokens.image_mask + [False] * len(known)])
        logits = self.model(ids, image_features=features, image_mask=mask, logits_to_keep=len(said)).logits
        assert logits is not None
        return logits[0]


def _as_seen(picture: Any, size: int) -> Tensor:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return torch.from_numpy(load_pixels(buffer.getvalue(), "picture", size))


def _compare_inputs(report: Report, loaded: Loaded, reader: _Reader, found: dict[str, Any]) -> bool:
    """Whether the export reads and sees the same; only then what it says can be compared."""
    image_id, std = loaded.checkpoint.config.vocab_size, max(loaded.model.spec.std)
    same, levels = 0, 0.0
    for case, tokens, answer in zip(CASES, reader.tokens, found["answers"], strict=True):
        ids = torch.tensor(tokens.input_ids).masked_fill(torch.tensor(tokens.image_mask), image_id)
        same += torch.equal(ids, answer["input_ids"])
        pixels, others = reader.pixels_of(case), answer["pixel_values"]
        if pixels is not None and (others is None or others.shape != pixels.shape):
            levels = 255.0
        elif pixels is not None:
            levels = max(levels, float((pixels - others).abs().max()) * std * 255)
    report.add("token ids", f"the same in {same} of {len(CASES)} prompts", same == len(CASES))
    report.add("pixels", f"at most {levels:.2g} of 255 grey levels apart", levels <= 1.01)
    return not report.wrong


def _largest(thought: list[Tensor], found: dict[str, Any]) -> float:
    """The largest difference of a logit; the image token, which we have not, has none."""
    return max(
        float((ours - answer["logits"][:, : ours.shape[1]]).abs().max())
        for ours, answer in zip(thought, found["answers"], strict=True)
    )


def _count_likeliest(thought: list[Tensor], found: dict[str, Any]) -> tuple[int, int]:
    """How many tokens that the export said are the source's choice too, up to the tolerance, and of how many."""
    same = count = 0
    for ours, answer in zip(thought, found["answers"], strict=True):
        said = answer["said"]
        chosen = ours.gather(1, said.clamp(max=ours.shape[1] - 1)[:, None])[:, 0]
        same += int((ours.max(-1).values - chosen <= TOLERANCE).sum())
        count += len(said)
    return same, count
