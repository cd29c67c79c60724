"""Rows as the model can read them: tokens cut to length, pictures as pixels, and every broken row by name."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from minimind_v.core.data.images import blank_pixels, load_pixels
from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.data.row import RowStore
from minimind_v.core.errors import RowError


@dataclass(frozen=True)
class BrokenRow:
    """A row that was left out, where it stands, and why."""

    place: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@dataclass
class Example:
    """One row: its tokens, and its pictures as uint8 [N, 3, S, S] once they are loaded."""

    index: int
    place: str
    tokens: Tokens
    names: list[str] = field(default_factory=list)
    pixels: np.ndarray | None = None


class RowDataset:
    """Joins a store of rows and a prompt encoder. Picklable."""

    def __init__(
        self,
        rows: RowStore,
        encoder: PromptEncoder,
        image_size: int,
        max_length: int,
        blank: bool = False,
    ) -> None:
        """`blank` shows a grey picture in place of every real one."""
        self.rows = rows
        self.encoder = encoder
        self.image_size = image_size
        self.max_length = max_length
        self.blank = blank

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, index: int) -> Example | BrokenRow:
        """The tokens of a row, its pictures not yet read: enough to know how long it is."""
        place = self.rows.place(index)
        try:
            row = self.rows.row(index)
            tokens = self.encoder.row(row.conversations, len(row.images), self.max_length)
        except RowError as error:
            return BrokenRow(place, error.kind, str(error))
        return Example(index, place, tokens, row.images[: tokens.images])

    def load(self, example: Example) -> Example | BrokenRow:
        """Read and decode the pictures of a row."""
        try:
            if example.names:
                pixels = [self._pixels(example.index, position, name) for position, name in enumerate(example.names)]
                example.pixels = np.stack(pixels)  # [N, 3, S, S]
        except RowError as error:
            return BrokenRow(example.place, error.kind, str(error))
        return example

    def _pixels(self, index: int, position: int, name: str) -> np.ndarray:
        if self.blank:
            return blank_pixels(self.image_size)
        return load_pixels(self.rows.picture(index, position, name), name, self.image_size)
