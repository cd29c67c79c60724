"""Compare an exported folder with its source: token ids, pixels, logits and greedy tokens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_v.core.data.images import load_pixels
from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.export.prove.ask_cases import ask
from minimind_v.core.export.prove.cases import CASES, Case, pictures
from minimind_v.core.export.prove.report import Report
from minimind_v.core.files import size_of
from minimind_v.core.formats.load import LoadedModel
from minimind_v.core.formats.request import ExportRequest

TOLERANCE = 1e-4  # of a logit in fp32; what rounding alone does is near 1e-6


def compare(order: ExportRequest, folder: Path, found: dict[str, Any]) -> Report:
    """Compare with the source of `order` what `folder` answered (`ask_cases.ask`).

    An export in another type is compared with the source's weights in that type, which must give the same; what the
    type itself costs is told beside.
    """
    loaded = order.load()
    loaded.checkpoint.tensors.clear()  # the model has them
    reader = _Reader(loaded)
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
    if _largest(thought, found) > TOLERANCE and loaded.model.config.use_moe:
        # Two experts as good as each other: rounding chose between them, and finer numbers choose the same.
        loaded.model.double()
        precision, reader, found = "fp64", _Reader(loaded), ask(folder, "float64")
        thought = reader.think(found)
    difference = _largest(thought, found)
    report.add(
        "largest logit difference",
        f"{difference:.1e} in {precision} (allowed: {TOLERANCE:.0e})",
        difference <= TOLERANCE,
    )
    if cost is not None:
        report.add(f"cost of {order.dtype}", f"{cost:.1e} of a logit")
    same, count = _count_likeliest(thought, found)
    report.add("greedy tokens", f"{same} of {count} equal", same == count)
    report.add("parameters", f"{found['parameters']:,}, vision encoder included")
    report.add("size", f"{size_of(folder):,} bytes; the source has {size_of(order.model):,}")
    return report


class _Reader:
    """The source reads the cases: ids, pixels, and the features of these."""

    @torch.inference_mode()
    def __init__(self, loaded: LoadedModel) -> None:
        self.model = loaded.model
        encoder = loaded.model.vision_encoder
        assert encoder is not None
        prompts = PromptEncoder(loaded.tokenizer, encoder.spec.tokens_per_image)
        self.tokens = [prompts.prompt(case.conversations) for case in CASES]
        images = [_as_seen(picture, encoder.spec.image_size) for picture in pictures()]
        self.pixels = [(picture.float() / 255 - encoder.mean) / encoder.std for picture in images]
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
        said_before = said[:-1].clamp(max=self.model.config.vocab_size - 1)
        ids = torch.cat((torch.tensor(tokens.input_ids), said_before))[None]  # [1, T + N - 1]
        mask = torch.tensor([tokens.image_mask + [False] * len(said_before)])
        logits = self.model(ids, image_features=features, image_mask=mask, logits_to_keep=len(said)).logits
        assert logits is not None
        return logits[0]


def _as_seen(picture: Any, size: int) -> Tensor:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return torch.from_numpy(load_pixels(buffer.getvalue(), "picture", size))


def _compare_inputs(report: Report, loaded: LoadedModel, reader: _Reader, found: dict[str, Any]) -> bool:
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
    report.add("token ids", f"equal in {same} of {len(CASES)} prompts", same == len(CASES))
    report.add("pixels", f"largest difference {levels:.2g} of 255 grey levels", levels <= 1.01)
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
