"""Rows as the model reads them: tokens cut to length, images as pixels or features; every broken row is reported."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from random import Random

import numpy as np
from torch import Tensor

from minimind_v.core.config.schema import VisionSpec
from minimind_v.core.data.feature_store import FeatureStore, digest
from minimind_v.core.data.images import blank_pixels, load_pixels
from minimind_v.core.data.prompt import PackedTokens, PromptEncoder, Tokens
from minimind_v.core.errors import RowError
from minimind_v.core.rows.forms import check_form
from minimind_v.core.rows.row import RowStore


@dataclass(frozen=True)
class BrokenRow:
    """A row, or a question of it, that is skipped: its file:row, and why."""

    location: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


@dataclass(frozen=True)
class LoadedImage:
    """An image: pixels to encode, uint8 [3, S, S], or its stored features [P, width]."""

    key: bytes  # digest of the picture file; empty if no features are stored
    pixels: np.ndarray | None = None
    features: Tensor | None = None


@dataclass
class Example:
    """One row: its tokens and, after `load`, its images."""

    index: int
    location: str
    tokens: Tokens | PackedTokens
    names: list[str] = field(default_factory=list)
    images: list[LoadedImage] = field(default_factory=list)


class RowDataset:
    """A store of rows and a prompt encoder. Picklable."""

    def __init__(
        self,
        rows: RowStore,
        encoder: PromptEncoder,
        image_size: int,
        max_length: int,
        blank: bool = False,
        resize_mode: str = "crop",
        resample: str = "bicubic",
    ) -> None:
        """`blank` gives a grey image in place of every real one. Resizing is that of the vision spec."""
        self.rows = rows
        self.encoder = encoder
        self.max_length = max_length
        self.blank = blank
        self.preparation = image_size, resize_mode, resample  # as `load_pixels` takes it
        self.seed: int | None = None  # of the forms of training rows; None: all rows have one form
        self.evaluated = False  # whether that is the form of evaluation; else the plain one
        self.remembered: FeatureStore | None = None  # images with stored features are not decoded

    @classmethod
    def for_spec(
        cls, rows: RowStore, encoder: PromptEncoder, spec: VisionSpec, max_length: int, blank: bool = False
    ) -> RowDataset:
        """Rows with images as the vision encoder of this spec takes them."""
        size, *resizing = spec.preparation
        return cls(rows, encoder, size, max_length, blank, *resizing)

    def for_training(self, seed: int) -> RowDataset:
        """The same rows, each in the form that a run with this seed trains on, where the layout has several."""
        if not self.encoder.layout.varies:
            return self
        dataset = copy.copy(self)
        dataset.seed = seed
        return dataset

    def for_evaluation(self) -> RowDataset:
        """The same rows, each in the form in which answers are scored: as in a chat."""
        if not self.encoder.layout.varies:
            return self
        dataset = copy.copy(self)
        dataset.seed, dataset.evaluated = None, True
        return dataset

    def draw(self, index: int) -> Random | None:
        """What decides the form of a training row: the seed and the row, so it is the same whoever reads the row."""
        return None if self.seed is None else Random(f"{self.seed} {index}")

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, index: int) -> Example | BrokenRow:
        """The tokens of a row; its picture files are not read."""
        location = self.rows.location(index)
        try:
            row = check_form(self.rows.row(index))
            tokens = self.encoder.row(
                row.conversations, len(row.images), self.max_length, self.draw(index), self.evaluated
            )
        except RowError as error:
            return BrokenRow(location, error.kind, str(error))
        tokens.notes = row.notes
        return Example(index, location, tokens, row.images[: tokens.images])

    def check(self, example: Example) -> BrokenRow | None:
        """Why a row is skipped whose picture files are missing; they are not decoded."""
        try:
            for position, name in enumerate(example.names):
                self.rows.picture(example.index, position, name)
        except RowError as error:
            return BrokenRow(example.location, error.kind, str(error))
        return None

    def load(self, example: Example) -> Example | BrokenRow:
        """Read the picture files of a row, and decode those without stored features."""
        try:
            example.images = [self._image(example.index, n, name) for n, name in enumerate(example.names)]
        except RowError as error:
            return BrokenRow(example.location, error.kind, str(error))
        return example

    def _image(self, index: int, position: int, name: str) -> LoadedImage:
        if self.blank:
            return LoadedImage(b"", blank_pixels(self.preparation[0]))
        data = self.rows.picture(index, position, name)
        key = digest(data) if self.remembered is not None else b""
        if self.remembered is not None and (features := self.remembered.read(key)) is not None:
            return LoadedImage(key, features=features)
        return LoadedImage(key, self.pixels(data, name))

    def pixels(self, data: bytes, name: str) -> np.ndarray:
        """A picture file as the vision encoder takes it: uint8 [3, S, S]. Raises RowError."""
        return load_pixels(data, name, *self.preparation)
