"""From a question and its images to the model's input tensors, for answers, batches and the Python API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minimind_v.core.arguments import checked
from minimind_v.core.data.images import load_pixels, to_pixels
from minimind_v.core.data.picture_names import Picture, check_question, read_picture
from minimind_v.core.data.prompt import IMAGE_MARK, PromptEncoder, Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError
from minimind_v.core.model.vision.spec import VisionSpec

Image = str | Path | bytes | Pillow.Image | np.ndarray | Picture
Images = Image | Sequence[Image] | None  # of one text


class Processor:
    """Encodes questions in the chat layout of a tokenizer, and images as a vision encoder takes them.

    An image is a path, the bytes of a picture file, a PIL image, or an array [H, W, 3], [H, W, 4] or [H, W] of uint8 or
    of floats from 0 to 1. Files are turned upright as their EXIF says; transparency is left out.
    """

    @checked
    def __init__(self, tokenizer: Tokenizer, spec: VisionSpec) -> None:
        self.prompts = PromptEncoder(tokenizer, spec.tokens_per_image)
        self.spec = spec
        self.pad_id = tokenizer.pad_id

    @checked
    def __call__(self, text: str | Sequence[str], images: Images | Sequence[Images] = None) -> dict[str, Tensor]:
        """Encode one question and its images, or a list of questions and a list with the images of each.

        Returns input_ids, attention_mask and image_mask, each [B, T], right-padded; and, if there are images,
        pixel_values uint8 [M, 3, S, S], all M images in reading order. B is 1 for one question. The logits at the last
        token of a row predict the first token of its answer.

        A question without `<image>` marks gets one for each image, in front.
        Raises UsageError for an empty question, or UsageError, MissingInput or RowError if images do not match the
        marks or cannot be read.

        >>> processor = mmv.load("out/sft_vlm_128.pth").processor
        >>> inputs = processor("What is this?", "pictures/star.jpg")
        >>> sorted(inputs), inputs["pixel_values"].shape
        (['attention_mask', 'image_mask', 'input_ids', 'pixel_values'], torch.Size([1, 3, 64, 64]))
        """
        several = isinstance(text, list | tuple)
        questions = [self.question(*pair) for pair in (_pairs(text, images) if several else [(text, images)])]
        inputs = self.pad([self.prompts.prompt([{"role": "user", "content": marked}]) for marked, _ in questions])
        if pixels := [image for _, images in questions for image in images]:
            inputs["pixel_values"] = torch.from_numpy(np.stack(pixels))
        return inputs

    @checked
    def question(self, text: str, images: Any = None) -> tuple[str, list[np.ndarray]]:
        """A question with a mark for each image, and the images as uint8 [3, S, S]. Raises errors as `__call__`."""
        given = [] if images is None else images if isinstance(images, list | tuple) else [images]
        check_question(text, len(given))
        pixels = [self.pixels(image) for image in given]
        if pixels and IMAGE_MARK not in text:
            text = f"{IMAGE_MARK}\n" * len(pixels) + text
        return text, pixels

    def pixels(self, image: Image) -> np.ndarray:
        """An image as uint8 [3, S, S]; such an array stays as it is. Raises UsageError, MissingInput or RowError."""
        size, *_ = preparation = self.spec.preparation
        if isinstance(image, np.ndarray):
            if image.shape == (3, size, size) and image.dtype == np.uint8:
                return image
            image = _from_array(image)
        if isinstance(image, Pillow.Image):
            return to_pixels(image, *preparation)
        if isinstance(image, bytes | bytearray):
            return load_pixels(bytes(image), "the image", *preparation)
        if isinstance(image, str | Path):
            image = read_picture(str(image))
        if isinstance(image, Tensor):
            raise _no_image("a tensor", image, "a numpy array [height, width, 3]")
        if not isinstance(image, Picture):
            kind = type(image).__name__
            raise UsageError(f"not an image: {kind} — give a path, bytes, a PIL image or a numpy array")
        return load_pixels(image.data, image.name, *preparation)

    def pad(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
        """Rows of tokens as input_ids, attention_mask and image_mask, each [B, T], right-padded."""

        def stack(values: list[list[Any]], padding: float) -> Tensor:
            return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=padding)

        return {
            "input_ids": stack([row.input_ids for row in rows], self.pad_id),
            "attention_mask": stack([[True] * len(row) for row in rows], False),
            "image_mask": stack([row.image_mask for row in rows], False),
        }


def _pairs(texts: Sequence[str], images: Any) -> list[tuple[str, Any]]:
    """Each of several texts with its images. Raises UsageError if their numbers differ."""
    images = [None] * len(texts) if images is None else images
    if not texts or not isinstance(images, list | tuple) or len(images) != len(texts):
        raise UsageError(f"{len(texts)} texts need a list of {len(texts)}: the image, images or None of each")
    return list(zip(texts, images, strict=True))


def _from_array(array: np.ndarray) -> Pillow.Image:
    """[H, W, 3], [H, W, 4] or [H, W], uint8 or floats from 0 to 1. Raises UsageError for any other array."""
    flat = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    floats = array.dtype.kind == "f" and array.size > 0 and array.min() >= 0 and array.max() <= 1
    if not (flat and array.size and (floats or array.dtype == np.uint8)):
        raise _no_image("an array", array, "[height, width, 3]")
    levels = (array * 255).round().astype(np.uint8) if floats else array
    return Pillow.fromarray(np.ascontiguousarray(levels))


def _no_image(kind: str, array: np.ndarray | Tensor, form: str) -> UsageError:
    """The error for an array or a tensor that is no image: what it is, and what to give in its place."""
    shape, type_name = list(array.shape), str(array.dtype).removeprefix("torch.")
    values = f", values from {array.min():g} to {array.max():g}" if "float" in type_name and 0 not in shape else ""
    is_first = len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (3, 4)
    order = ", with the channels last" if is_first else ""
    return UsageError(
        f"not an image: {kind} of shape {shape} and type {type_name}{values} — give {form} of uint8, or of floats from "
        f"0 to 1{order}"
    )
