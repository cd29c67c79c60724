"""Rows as the model reads them: tokens cut to length, images as pixels or features, and every broken row by name."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from minimind_v.core.data.feature_store import FeatureStore, digest
from minimind_v.core.data.images import blank_pixels, load_pixels
from minimind_v.core.data.prompt import PackedTokens, PromptEncoder, Tokens
from minimind_v.core.errors import RowError
from minimind_v.core.rows.forms import no_form
from minimind_v.core.rows.row import RowStore


@dataclass(frozen=True)
class BrokenRow:
    """A row that was left out, where it stands, and why."""

    place: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@dataclass(frozen=True)
class Picture:
    """An image: pixels to encode, uint8 [3, S, S], or its stored features [P, width]."""

    key: bytes  # of its file's content; empty where no features are stored
    pixels: np.ndarray | None = None
    features: Tensor | None = None


@dataclass
class Example:
    """One row: its tokens and, once they are loaded, its images, each as stored features or as pixels."""

    index: int
    place: str
    tokens: Tokens | PackedTokens
    names: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    @property
    def pixels(self) -> np.ndarray | None:
        """The images to encode, uint8 [N, 3, S, S]; None without any."""
        pixels = [picture.pixels for picture in self.pictures if picture.pixels is not None]
        return np.stack(pixels) if pixels else None


class RowDataset:
    """Joins a store of rows and a prompt encoder. Picklable."""

    def __init__(
        self,
        rows: RowStore,
        encoder: PromptEncoder,
        image_size: int,
        max_length: int,
        blank: bool = False,
        fit: str = "crop",
    ) -> None:
        """`blank` gives a grey image in place of every real one. `fit` is that of the vision spec."""
        self.rows = rows
        self.encoder = encoder
        self.image_size = image_size
        self.max_length = max_length
        self.blank = blank
        self.fit = fit
        self.remembered: FeatureStore | None = None  # images whose features it has are not decoded

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, index: int) -> Example | BrokenRow:
        """The tokens of a row, its pictures not yet read: enough to know how long it is."""
        place = self.rows.location(index)
        try:
            row = self.rows.row(index)
            if row.conversations is None:
                raise no_form(row)
            tokens = self.encoder.row(row.conversations, len(row.images), self.max_length)
        except RowError as error:
            return BrokenRow(place, error.kind, str(error))
        tokens.notes = row.notes
        return Example(index, place, tokens, row.images[: tokens.images])

    def load(self, example: Example) -> Example | BrokenRow:
        """Read the picture files of a row, and decode those whose features are not stored."""
        try:
            example.pictures = [self._picture(example.index, n, name) for n, name in enumerate(example.names)]
        except RowError as error:
            return BrokenRow(example.place, error.kind, str(error))
        return example

    def _picture(self, index: int, position: int, name: str) -> Picture:
        if self.blank:
            return Picture(b"", blank_pixels(self.image_size))
        data = self.rows.picture(index, position, name)
        key = digest(data) if self.remembered is not None else b""
        if self.remembered is not None and (features := self.remembered.read(key)) is not None:
            return Picture(key, features=features)
        return Picture(key, load_pixels(data, name, self.image_size, self.fit))
