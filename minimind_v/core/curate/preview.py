"""Rows as the model receives them: images of its size, tokens, supervised tokens, cut tokens."""

from __future__ import annotations

import io
import json
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.curate.count import NO_LIMIT, plan_batches
from minimind_v.core.curate.token_text import Piece, TokenReader
from minimind_v.core.data.dataset import BrokenRow, Example, RowDataset
from minimind_v.core.data.images import decode, encode_png
from minimind_v.core.data.loader import WINDOW, BatchPlan
from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.errors import RowError
from minimind_v.core.model.vision.encoder import VisionSpec
from minimind_v.core.rows.row import IMAGE_MARK, Row, RowStore

THUMBNAIL = 360  # pixels of the longer side
MOST_PIECES = 4000  # tokens of one row that are shown
MOST_PICTURES = 16  # of one row that are shown
MOST_TEXT = 2000  # characters of a broken row that are shown
TEXT_ROW = f"a text row: it has an image but no {IMAGE_MARK} in its text, so the model does not receive the image"


@dataclass(frozen=True)
class PictureView:
    """A picture file, and the image that the model receives."""

    name: str
    trouble: str = ""
    kind: str = ""  # of the trouble
    width: int = 0  # of the original, upright
    height: int = 0
    size: int = 0  # of its file, in bytes
    thumbnail: bytes = b""  # JPEG of the whole original
    model: bytes = b""  # PNG with the vision encoder's input pixels
    squeezed: bool = False  # to a square; else cropped

    @property
    def kept(self) -> float:
        """Share of the original's area that the model receives."""
        return 1.0 if self.squeezed else min(self.width, self.height) / max(self.width, self.height, 1)

    @property
    def resizing(self) -> str:
        """How the original becomes a square."""
        if self.squeezed and self.width != self.height:
            ratio = max(self.width, self.height) / min(self.width, self.height)
            return f"squeezed to a square: its longer side shrinks {ratio:.2f} times as much as the other"
        return "nothing cropped" if self.kept == 1 else f"{1 - self.kept:.0%} outside the crop"


@dataclass(frozen=True)
class BatchView:
    """The batch of a row in the first epoch."""

    rows: int
    length: int  # of its longest row, to which all are padded


@dataclass(frozen=True)
class RowView:
    """One row. Training uses it if it has no `trouble`; a row with trouble may have `pieces` too."""

    location: str
    trouble: str = ""
    kind: str = ""  # of the trouble
    pieces: list[Piece] = field(default_factory=list)
    hidden: int = 0  # tokens that are not shown
    tokens: Tokens = field(default_factory=Tokens)  # after truncation
    whole: int = 0  # tokens before truncation
    answers_lost: int = 0  # answer tokens that truncation removed
    unanswered: str = ""  # a last question without an answer, which training drops
    unmarked: int = 0  # pictures of a text row, which has no mark
    pictures: list[PictureView] = field(default_factory=list)
    batch: BatchView | None = None
    source: str = ""  # of a broken row

    @property
    def supervised(self) -> int:
        return sum(self.tokens.loss_mask)


class Previewer:
    """Reads rows as a run with this recipe would."""

    def __init__(self, rows: RowStore, encoder: PromptEncoder, spec: VisionSpec, config: RunConfig) -> None:
        self.rows = rows
        self.encoder = encoder
        self.spec = spec
        self.config = config
        self._reader = TokenReader(encoder.tokenizer)
        self._plan: BatchPlan = plan_batches(rows, encoder, config)
        self._dataset = RowDataset.for_spec(rows, encoder, spec, config.data.max_length).for_training(config.seed)

    def choose(self, count: int, seed: int, start: int | None = None) -> list[int]:
        """Indices of `count` rows in the order of the file: drawn, or from row number `start` on."""
        if start is not None:
            # Each shard counts from 1; `start` counts through all shards of a folder.
            begin = (
                bisect_left(range(len(self.rows)), start, key=self.rows.number)
                if self.rows.path.is_file()
                else start - 1
            )
            return list(range(begin, min(begin + count, len(self.rows))))
        drawn = np.random.default_rng(seed).choice(len(self.rows), min(count, len(self.rows)), replace=False)
        return sorted(int(index) for index in drawn)

    def view(self, index: int) -> RowView:
        """One row; a problem of the row is its `trouble`, not an error."""
        location = self.rows.location(index)
        try:
            row = self.rows.row(index)
        except RowError as error:
            return RowView(location, str(error), error.kind)
        pictures = [self._picture(index, n, name) for n, name in enumerate(row.shown[:MOST_PICTURES])]
        draw, images = self._dataset.draw(index), len(row.images)
        trouble, kind, kept = "", "", Tokens()
        try:
            kept = whole = self.encoder.row(row.conversations, images, self.config.data.max_length, draw)
        except RowError as error:
            trouble, kind = str(error), error.kind
        if trouble or kept.answers_cut:  # a row that is cut has the plain form
            try:
                whole = self.encoder.row(row.conversations, images, NO_LIMIT)
            except RowError as error:
                return RowView(location, str(error), error.kind, pictures=pictures, source=_source(row))
        bad = next((n for n, picture in enumerate(pictures[: kept.images]) if picture.trouble), None)
        if bad is not None:
            trouble, kind = pictures[bad].trouble, pictures[bad].kind
        last = row.conversations[-1]
        pieces = self._reader.pieces(whole, len(kept), self.spec.tokens_per_image, MOST_PIECES)
        return RowView(
            location,
            trouble,
            kind,
            pieces,
            len(whole) - sum(len(piece.ids) for piece in pieces),
            kept,
            len(whole),
            sum(whole.loss_mask) - sum(kept.loss_mask),
            last["content"][:MOST_TEXT] if last["role"] == "user" else "",
            whole.unmarked,
            pictures,
            None if trouble else self._batch(index),
        )

    def _picture(self, index: int, position: int, name: str) -> PictureView:
        try:
            data = self.rows.picture(index, position, name)
            pixels = self._dataset.pixels(data, name)  # [3, S, S]
            original = decode(data, name)
        except RowError as error:
            return PictureView(name, str(error), error.kind)
        width, height = original.size
        original.thumbnail((THUMBNAIL, THUMBNAIL))
        thumbnail = io.BytesIO()
        original.save(thumbnail, "JPEG", quality=80)
        squeezed = self.spec.resize_mode == "squeeze"
        return PictureView(name, "", "", width, height, len(data), thumbnail.getvalue(), encode_png(pixels), squeezed)

    def _batch(self, index: int) -> BatchView | None:
        """The row's batch in the plan: the batch decides how much padding a row gets."""
        window = int(np.flatnonzero(self._plan.order(0) == index)[0]) // (WINDOW * self._plan.rows_per_step)
        planned = self._plan.window(0, window)
        for batch in (batch for step in planned.steps for batch in step):
            texts = [planned.texts[row] for row in batch.tolist()]
            examples: list[Example] = [row for row in texts if not isinstance(row, BrokenRow)]
            if any(example.index == index for example in examples):
                return BatchView(len(examples), max(len(example.tokens) for example in examples))
        return None


def _source(row: Row) -> str:
    """The text of a broken row."""
    value: dict[str, Any] = {"conversations": row.conversations, "image": row.images}
    text = json.dumps(value, ensure_ascii=False, indent=1, default=str)
    return text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + " …"


def as_json(view: RowView) -> dict[str, Any]:
    """A row as JSON for programs: its ids, and the ranges of supervised ones."""
    mask = [False, *view.tokens.loss_mask, False]
    edges = [n for n in range(len(mask) - 1) if mask[n] != mask[n + 1]]
    return {
        "place": view.location,
        "used": not view.trouble,
        "kind": view.kind,
        "message": view.trouble,
        "tokens": len(view.tokens),
        "tokens_before_truncation": view.whole,
        "supervised_tokens": view.supervised,
        "answer_tokens_cut": view.answers_lost,
        "unmarked_pictures": view.unmarked,
        "image_tokens": sum(view.tokens.image_mask),
        "padded_to": view.batch.length if view.batch else None,
        "pictures": [
            {key: getattr(picture, key) for key in ("name", "width", "height", "kept", "trouble")}
            for picture in view.pictures
        ],
        "input_ids": view.tokens.input_ids,
        "supervised": list(zip(edges[::2], edges[1::2], strict=True)),
    }
