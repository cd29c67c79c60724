"""Compare an exported folder with its source: token ids, pixels, logits and greedy tokens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from minimind_v.core.config.schema import VisionSpec
from minimind_v.core.data.images import load_pixels
from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.export.prove.cases import CASES, Case, ask, images
from minimind_v.core.export.prove.report import Report
from minimind_v.core.files import size_of
from minimind_v.core.formats.hf.write import form_of
from minimind_v.core.formats.load import LoadedModel
from minimind_v.core.formats.request import ExportRequest

TOLERANCE = 1e-4  # of a logit in fp32; rounding alone gives about 1e-6


def compare(order: ExportRequest, folder: Path, export: dict[str, Any]) -> Report:
    """Compare the answers of `folder` (`cases.ask`) with the source of `order`.

    An export in another type is compared with the source's weights in that type, which must give the same; the report
    also has the cost of the type itself.
    """
    loaded = order.load()
    loaded.checkpoint.tensors.clear()  # the model has them
    reader = _Reader(loaded, export)
    lossy = order.dtype in ("float16", "bfloat16")
    cost = _largest(reader.logits(export), export) if lossy else None
    if lossy:
        for parameter in loaded.model.parameters():  # not buffers: no file has them
            parameter.data = parameter.to(getattr(torch, str(order.dtype))).float()
        reader = _Reader(loaded, export)
    report = Report()
    report.add("opened by", f"transformers, {export['class']}, without remote code")
    if export["stands_in"]:
        report.add("images prepared by", "Pillow, not by the folder's own processor: it needs torchvision")
    if not _compare_inputs(report, loaded, reader, export):
        return report
    precision, logits = "fp32", reader.logits(export)
    if _largest(logits, export) > TOLERANCE and loaded.model.config.use_moe:
        # Rounding may choose between two equally good experts; in fp64 both sides choose the same.
        loaded.model.double()
        precision, export = "fp64", ask(folder, "float64")
        reader = _Reader(loaded, export)
        logits = reader.logits(export)
    difference = _largest(logits, export)
    report.add(
        "largest logit difference",
        f"{difference:.1e} in {precision} (allowed: {TOLERANCE:.0e})",
        difference <= TOLERANCE,
    )
    if cost is not None:
        report.add(f"cost of {order.dtype}", f"{cost:.1e} of a logit")
    same, count = _count_likeliest(logits, export)
    report.add("greedy tokens", f"{same} of {count} equal", same == count)
    report.add("parameters", f"{export['parameters']:,}, vision encoder included")
    report.add("size", f"{size_of(folder):,} bytes; the source has {size_of(order.model):,}")
    return report


class _Reader:
    """The source's ids, pixels and features of the cases.

    Features are those of the export's pixels: where another library has prepared its images, these differ by a level.
    """

    @torch.inference_mode()
    def __init__(self, loaded: LoadedModel, export: dict[str, Any]) -> None:
        self.model = loaded.model
        encoder = loaded.model.vision_encoder
        assert encoder is not None
        prompts = PromptEncoder(loaded.tokenizer, encoder.spec.tokens_per_image)
        self.tokens = [prompts.prompt(case.conversations) for case in CASES]
        uint8 = [_load(image, encoder.spec) for image in images()]
        self.pixels = [(pixels.float() / 255 - encoder.mean) / encoder.std for pixels in uint8]
        self.features: list[Tensor | None] = []
        for case, answer in zip(CASES, export["answers"], strict=True):
            ours, theirs = self.pixels_of(case), _images(answer["pixel_values"], encoder.spec)
            if ours is not None and theirs is not None and theirs.shape == ours.shape:
                ours = theirs
            self.features.append(None if ours is None else encoder(ours))  # [M, P, width]

    def pixels_of(self, case: Case) -> Tensor | None:
        return torch.stack([self.pixels[number] for number in case.images]) if case.images else None

    @torch.inference_mode()
    def logits(self, export: dict[str, Any]) -> list[Tensor]:
        """For each case the logits [N, V] of the N tokens that the export generated."""
        return [
            self._logits_of(answer["tokens"], tokens, features)
            for tokens, features, answer in zip(self.tokens, self.features, export["answers"], strict=True)
        ]

    def _logits_of(self, answer: Tensor, tokens: Tokens, features: Tensor | None) -> Tensor:
        earlier = answer[:-1].clamp(max=self.model.config.vocab_size - 1)
        ids = torch.cat((torch.tensor(tokens.input_ids), earlier))[None]  # [1, T + N - 1]
        mask = torch.tensor([tokens.image_mask + [False] * len(earlier)])
        logits = self.model(ids, image_features=features, image_mask=mask, logits_to_keep=len(answer)).logits
        assert logits is not None
        return logits[0]


def _load(image: Image, spec: VisionSpec) -> Tensor:
    """The pixels of an image, as the model gets them from a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return torch.from_numpy(load_pixels(buffer.getvalue(), "picture", *spec.preparation).copy())


def _compare_inputs(report: Report, loaded: LoadedModel, reader: _Reader, export: dict[str, Any]) -> bool:
    """Whether the export gets the same ids and pixels; only then its answers can be compared."""
    config, spec = loaded.checkpoint.config, loaded.model.spec
    image_id = config.vocab_size if form_of(config).adds_image_token else loaded.tokenizer.placeholder_id
    same, levels = 0, 0.0
    for case, tokens, answer in zip(CASES, reader.tokens, export["answers"], strict=True):
        ids = torch.tensor(tokens.input_ids).masked_fill(torch.tensor(tokens.image_mask), image_id)
        same += torch.equal(ids, answer["input_ids"])
        pixels, others = reader.pixels_of(case), _images(answer["pixel_values"], spec)
        if pixels is None:
            continue
        if others is None or others.shape != pixels.shape:
            levels = 255.0
        else:
            scale = torch.tensor(spec.std)[:, None, None] * 255
            levels = max(levels, float(((pixels - others) * scale).abs().max()))
    report.add("token ids", f"equal in {same} of {len(CASES)} prompts", same == len(CASES))
    report.add("pixels", f"largest difference {levels:.2g} of 255 grey levels", levels <= 1.01)
    return not report.wrong


def _images(pixels: Tensor | None, spec: VisionSpec) -> Tensor | None:
    """The pixels of an export as images [M, 3, S, S]: SigLIP2 reads flat patches [M, P, p · p · 3]."""
    side = spec.patch_size
    row = spec.image_size // side
    if pixels is None or pixels.shape[1:] != (row * row, side * side * 3):
        return pixels
    tiles = pixels.unflatten(2, (side, side, 3)).unflatten(1, (row, row))  # [M, S / p, S / p, p, p, 3]
    return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _largest(logits: list[Tensor], export: dict[str, Any]) -> float:
    """The largest difference of a logit, the image token left out: the source has no logit for it."""
    return max(
        float((ours - answer["logits"][:, : ours.shape[1]]).abs().max())
        for ours, answer in zip(logits, export["answers"], strict=True)
    )


def _count_likeliest(logits: list[Tensor], export: dict[str, Any]) -> tuple[int, int]:
    """How many tokens of the export are the source's choice too, up to the tolerance, and of how many."""
    same = count = 0
    for ours, answer in zip(logits, export["answers"], strict=True):
        tokens = answer["tokens"]
        chosen = ours.gather(1, tokens.clamp(max=ours.shape[1] - 1)[:, None])[:, 0]
        same += int((ours.max(-1).values - chosen <= TOLERANCE).sum())
        count += len(tokens)
    return same, count
