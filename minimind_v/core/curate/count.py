"""Count tokens, padding and cuts of rows in the batches that training would make."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.dataset import BrokenRow, Example, RowDataset
from minimind_v.core.data.loader import BatchPlan
from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.errors import RowError
from minimind_v.core.rows.row import IMAGE_MARK, Row, RowStore

NO_LIMIT = 10**9  # tokens: nothing is cut
SAMPLE = 2000  # characters of a row from which its language is guessed

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
LATIN = "A-Za-z\u00c0-\u024f"
_HAN, _LATIN = re.compile(f"[{HAN}]"), re.compile(f"[{LATIN}]+")
_OTHER = re.compile(rf"(?![{HAN}{LATIN}])[^\W\d_]")


def _numbers() -> array[int]:
    return array("I")  # a list of a million numbers has a million objects


@dataclass
class Counted:
    """Counts over rows in their training form. Arrays have a number per row, of the whole row, before truncation."""

    total: array[int] = field(default_factory=_numbers)
    prompt: array[int] = field(default_factory=_numbers)
    answers: array[int] = field(default_factory=_numbers)
    images: array[int] = field(default_factory=_numbers)  # placeholders of images
    turns: array[int] = field(default_factory=_numbers)
    pictures: array[int] = field(default_factory=_numbers)
    languages: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)  # rows by kind
    first_skipped: dict[str, tuple[int, str]] = field(default_factory=dict)  # by kind: row number, location and reason
    text_rows: int = 0  # with pictures and no mark
    notes: Counter[str] = field(default_factory=Counter)  # rows by how their reading differs from their text
    cut: int = 0  # rows
    turns_lost: int = 0
    answers_lost: int = 0  # tokens
    used: int = 0  # rows that training uses
    kept: int = 0  # their tokens, placeholders included
    padded: int = 0  # the same with the padding of their batches
    supervised: int = 0  # tokens
    pictures_kept: int = 0


def plan_batches(
    rows: RowStore,
    encoder: PromptEncoder,
    config: RunConfig,
    counted: Counted | None = None,
    keep: np.ndarray | None = None,
) -> BatchPlan:
    """The plan of a run; `counted` counts rows when they are read. No picture file is read: the image size is 0.

    `keep`, bool [rows], selects rows.
    """
    data = config.data
    dataset = RowDataset(rows, encoder, 0, data.max_length)
    if counted is not None:
        dataset = _CountedRows(rows, encoder, 0, data.max_length)
        dataset.counted = counted
    rows_per_step = data.batch_size * config.accumulate * config.gpus
    return BatchPlan(
        dataset.for_training(config.seed),
        data.batch_size,
        encoder.tokenizer.pad_id,
        config.seed,
        rows_per_step=rows_per_step,
        processes=config.gpus,
        keep=keep,
    )


def count(plan: BatchPlan, counted: Counted, progress: Callable[[int, int], None]) -> None:
    """Count the rows and batches of the first epoch."""
    done = 0
    for window in range(plan.windows):
        planned = plan.window(0, window)
        for batch in (batch for step in planned.steps for batch in step):
            texts = [planned.texts[row] for row in batch.tolist()]
            lengths = [len(row.tokens) for row in texts if isinstance(row, Example)]
            counted.padded += max(lengths, default=0) * len(lengths)
            done += len(batch)
        progress(done, plan.rows)


class _CountedRows(RowDataset):
    """Counts rows when it reads their text."""

    counted: Counted

    def text(self, index: int) -> Example | BrokenRow:
        read, counted = super().text(index), self.counted
        kept = read.tokens if isinstance(read, Example) else Tokens()
        assert isinstance(kept, Tokens)
        if isinstance(read, Example):
            counted.used += 1
            counted.kept += len(kept)
            counted.supervised += sum(kept.loss_mask)
            counted.pictures_kept += kept.images
            counted.text_rows += kept.unmarked > 0
            counted.notes.update(kept.notes)
        else:
            counted.skipped[read.kind] += 1
            first = (self.rows.number(index), str(read))  # rows come in the order of training
            counted.first_skipped[read.kind] = min(first, counted.first_skipped.get(read.kind, first))
        try:
            row = self.rows.row(index)
        except RowError:
            return read
        counted.pictures.append(len(row.shown))
        counted.languages[language(row.conversations)] += 1
        whole = self._whole(row, read)
        if whole is not None:
            self._count(whole)
            if isinstance(read, Example) and len(whole) > len(kept):
                counted.cut += 1
                counted.turns_lost += self._turns(whole) - self._turns(kept)
                counted.answers_lost += sum(whole.loss_mask) - sum(kept.loss_mask)
        return read

    def _count(self, whole: Tokens) -> None:
        counted, images, answers = self.counted, sum(whole.image_mask), sum(whole.loss_mask)
        counted.total.append(len(whole))
        counted.images.append(images)
        counted.answers.append(answers)
        counted.prompt.append(len(whole) - images - answers)
        counted.turns.append(self._turns(whole))

    def _whole(self, row: Row, read: Example | BrokenRow) -> Tokens | None:
        """The tokens without truncation; tokenises a row that is cut again. Such a row has the plain form."""
        if isinstance(read, Example):
            assert isinstance(read.tokens, Tokens)
            if not read.tokens.answers_cut:
                return read.tokens
        elif read.kind != "too long":
            return None
        try:
            return self.encoder.row(row.conversations, len(row.images), NO_LIMIT)
        except RowError:
            return None

    def _turns(self, tokens: Tokens) -> int:
        """Questions with answers. No user's text has the id that begins a message."""
        return tokens.input_ids.count(self.encoder.tokenizer.bos_id) // 2  # there is at most one system message


def language(conversations: Any) -> str:
    """The language of a conversation, by its script: a Chinese character counts as much as a Latin word."""
    if not isinstance(conversations, list):
        return "other"
    texts = (message.get("content") for message in conversations if isinstance(message, dict))
    text = " ".join(content[:SAMPLE] for content in texts if isinstance(content, str))[:SAMPLE].replace(IMAGE_MARK, "")
    han, latin, other = (len(pattern.findall(text)) for pattern in (_HAN, _LATIN, _OTHER))
    if other > han + latin or not han + latin:
        return "other"
    if 0.2 < han / (han + latin) < 0.8:
        return "mixed"
    return "Chinese" if han > latin else "English"
