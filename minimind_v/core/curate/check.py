"""Check every row for every problem that training would meet.

A row is read as training reads it, by the same functions, so the two cannot disagree. What training would do about each
kind of problem stands in `KINDS`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minimind_v.core.curate.compressed_list import Packed
from minimind_v.core.curate.count import NO_LIMIT
from minimind_v.core.curate.workers import each_row
from minimind_v.core.data.dataset import BrokenRow, RowDataset
from minimind_v.core.data.images import is_dark_on_transparent, load_pixels
from minimind_v.core.errors import RowError
from minimind_v.core.rows.digests import Digests, picture_digest, text_digest, whole_digest
from minimind_v.core.rows.forms import no_form
from minimind_v.core.rows.heldout import digests_of
from minimind_v.core.rows.row import NOTES, Row, RowStore, describe_notes, describe_text_rows

SKIPPED, CUT, TRAINED = "skips the row", "cuts the row", "still uses the row"
KINDS = {  # what training does about a row with this problem; every other kind that a row can have is skipped
    "cut": CUT,
    "unanswered": CUT,
    "empty answer": TRAINED,
    "unused picture": TRAINED,
    "dark on transparent": TRAINED,
    "duplicate row": TRAINED,
    "duplicate picture": TRAINED,
    "held out": TRAINED,
}
DARK_ON_TRANSPARENT = "dark on a transparent background, which becomes black in training — save it on white"
EXAMPLES = 3  # places that a summary tells of each kind


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a row."""

    row: int  # its number from 1, in JSONL its line
    kind: str
    message: str
    place: str  # file:row

    @property
    def training(self) -> str:
        """What training does about it."""
        return KINDS.get(self.kind, SKIPPED)


Told = tuple[int, str, str]  # index of a row, kind and message of something that is wrong with it


@dataclass
class Found:
    """What one process found out about one row."""

    index: int
    problems: list[tuple[str, str]] = field(default_factory=list)  # kind and message
    whole: int | None = None  # a digest of text and pictures, where all of them can be read
    parts: list[int] = field(default_factory=list)  # digests of each picture shown or, without any, of the text
    text_row: bool = False  # it has pictures and no mark for any
    notes: tuple[str, ...] = ()  # in what it is read in another way than it is written


class Report:
    """What is wrong with a set of rows. Of a row without fault nothing is kept but numbers."""

    def __init__(self, rows: RowStore, held_out: RowStore | None = None) -> None:
        self._store, self._held_out = rows, held_out
        self._told: Packed[Told] = Packed()
        self._wholes, self._parts = Digests(), Digests()
        count = len(rows)
        self.skipped = np.zeros(count, bool)  # [rows], those that training would skip
        self.repeated = np.zeros(count, bool)  # [rows], those that stand earlier too, or in the held-out file
        self.whole = np.zeros(count, bool)  # [rows], those that can be copied: nothing that they name is missing
        self.text_rows = np.zeros(count, bool)  # [rows], those with pictures that no mark shows: no problem
        self.notes = {note: np.zeros(count, bool) for note in NOTES}  # [rows], of each note: no problem either
        # Index of the row with the same text and pictures, with one of the pictures, and of the held-out one; or -1.
        self._copies, self._shown, self._kept = (np.full(count, -1, np.int64) for _ in range(3))

    @property
    def rows(self) -> int:
        return len(self.skipped)

    def add(self, found: Found) -> None:
        """Take in the next row."""
        self.text_rows[found.index] = found.text_row
        for note in found.notes:
            self.notes[note][found.index] = True
        for kind, message in found.problems:
            self._told.append((found.index, kind, message))
            if kind not in KINDS:
                self.skipped[found.index] = True
        if found.whole is not None:
            self.whole[found.index] = True
            self._wholes.add(found.index, found.whole)
            for digest in found.parts:
                self._parts.add(found.index, digest)

    def compare(self, held_out: Digests) -> None:
        """Find the rows that stand twice, when all are here."""
        self._copies = self._wholes.seen_before(self.rows)
        self._shown = np.where(self._copies < 0, self._parts.seen_before(self.rows), -1)
        self._kept = self._parts.seen_in(held_out, self.rows)
        self.repeated = (self._copies >= 0) | (self._kept >= 0)

    def place(self, index: int) -> str:
        """`file:row`."""
        return self._store.location(index)

    def problems(self) -> Iterator[Problem]:
        """Everything that was found, in the order of the rows."""
        for index, kind, message in heapq.merge(self._told, self._repetitions(), key=lambda told: told[0]):
            yield Problem(self._store.number(index), kind, message, self._store.location(index))

    def _repetitions(self) -> Iterator[Told]:
        for index in np.flatnonzero((self._shown >= 0) | self.repeated).tolist():
            if (first := self._copies[index]) >= 0:
                yield index, "duplicate row", f"the same text and pictures as {self._store.location(int(first))}"
            if (first := self._shown[index]) >= 0:
                yield index, "duplicate picture", f"a picture of {self._store.location(int(first))}"
            if self._held_out and (first := self._kept[index]) >= 0:
                yield index, "held out", f"shared with {self._held_out.location(int(first))}"

    def refusal(self, bad_rows: float) -> str | None:
        """Why training would refuse these rows, if it would; `bad_rows` is the share of broken ones that it allows."""
        skipped = int(self.skipped.sum())
        if skipped == self.rows:
            return "no row is usable"
        if skipped > bad_rows * self.rows:
            return f"{skipped} of {self.rows} rows are broken, more than {bad_rows:.0%}"
        return None


def check(
    dataset: RowDataset,
    workers: int,
    held_out: RowStore | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Check all rows in several processes. A process that a row kills is replaced, and the row named."""
    report = Report(dataset.rows, held_out)
    kept = _all_digests(held_out) if held_out else Digests()
    for checked_row in each_row(check_row, dataset, workers, _crashed):
        report.add(checked_row)
        if checked_row.index % 100 == 99 or checked_row.index + 1 == len(dataset):
            progress(checked_row.index + 1, len(dataset))
    report.compare(kept)
    return report


def _crashed(index: int) -> Found:
    return Found(index, [("crash", "reading this row crashed the process")])


def _all_digests(rows: RowStore) -> Digests:
    """Each picture of a set, and the text of each row without any."""
    digests = Digests()
    for index in range(len(rows)):
        with suppress(RowError):  # it is nobody's copy
            for digest in digests_of(rows, index):
                digests.add(index, digest)
    return digests


# --- one row ----------------------------------------------------------------------------------------------------------


def check_row(dataset: RowDataset, index: int) -> Found:
    """All that can be told of one row."""
    checked = Found(index)
    try:
        row = dataset.rows.row(index)
        if row.conversations is None:
            raise no_form(row)
    except RowError as error:
        checked.problems.append((error.kind, str(error)))
        return checked
    checked.notes = row.notes
    used = _check_text(dataset, index, row, checked)
    pictures: list[int] = []
    for position, name in enumerate(row.images):
        try:
            data = dataset.rows.picture(index, position, name)
            pictures.append(picture_digest(data))
            if not checked.text_row:
                load_pixels(data, name, dataset.image_size, dataset.fit)
                if position < used and is_dark_on_transparent(data):
                    checked.problems.append(("dark on transparent", f"{name}: {DARK_ON_TRANSPARENT}"))
        except RowError as error:
            if checked.text_row:
                checked.problems.append(("unused picture", f"{error} (in a text row, so training does not read it)"))
            elif position >= used:  # training never looks at it
                checked.problems.append(("cut", f"{error} (in a turn that is cut off)"))
            else:
                checked.problems.append((error.kind, str(error)))
            if error.kind == "placeholders":
                break  # says it of all
    if len(pictures) == len(row.images):
        text = text_digest(row)
        checked.whole, checked.parts = whole_digest(text, pictures), (pictures if row.shown else []) or [text]
    return checked


def _check_text(dataset: RowDataset, index: int, row: Row, checked: Found) -> int:
    """How many of the row's pictures training would read."""
    if isinstance(row.conversations, list):
        for number, message in enumerate(row.conversations, 1):
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, str) and message.get("role") == "assistant" and not content.strip():
                checked.problems.append(("empty answer", f"message {number}, an answer, is empty"))
    try:
        whole = dataset.encoder.row(row.conversations, len(row.images), NO_LIMIT)
    except RowError as error:
        checked.problems.append((error.kind, str(error)))
        return len(row.images)
    checked.text_row = whole.unmarked > 0
    if row.conversations[-1]["role"] == "user":
        checked.problems.append(("unanswered", "the last question has no answer and is not used"))
    if len(whole) <= dataset.max_length:
        return whole.images
    kept = dataset.text(index)
    if isinstance(kept, BrokenRow):
        checked.problems.append((kept.kind, kept.message))
        return len(row.images)
    lost = sum(whole.loss_mask) - sum(kept.tokens.loss_mask)
    checked.problems.append(
        ("cut", f"{len(whole)} tokens, the maximum is {dataset.max_length}: {lost} answer tokens are cut off")
    )
    return kept.tokens.images


def summary(report: Report, bad_rows: float) -> dict[str, Any]:
    """The report for a program to read, its problems by kind; each by itself is what `Report.problems` gives."""
    counts: Counter[str] = Counter()
    first: dict[str, list[Problem]] = {}
    for problem in report.problems():
        counts[problem.kind] += 1
        if len(examples := first.setdefault(problem.kind, [])) < EXAMPLES:
            examples.append(problem)
    refusal, text_rows = report.refusal(bad_rows), np.flatnonzero(report.text_rows)
    return {
        "rows": report.rows,
        "usable": report.rows - int(report.skipped.sum()),
        "ok": refusal is None,
        "refusal": refusal,
        "kinds": {
            kind: {
                "count": count,
                "training": first[kind][0].training,
                "first": [problem.place for problem in first[kind]],
                "message": first[kind][0].message,
            }
            for kind, count in counts.most_common()
        },
        "text_rows": {
            "count": len(text_rows),
            "first": [report.place(int(index)) for index in text_rows[:EXAMPLES]],
            "message": describe_text_rows(len(text_rows), report.rows) if len(text_rows) else "",
        },
        "notes": {
            note: {
                "count": int(rows.sum()),
                "first": [report.place(int(index)) for index in np.flatnonzero(rows)[:EXAMPLES]],
                "message": describe_notes({note: int(rows.sum())}, report.rows)[0],
            }
            for note, rows in report.notes.items()
            if rows.any()
        },
    }


def as_json(problem: Problem) -> dict[str, Any]:
    """A problem for a program to read."""
    return {"row": problem.row, "kind": problem.kind, "message": problem.message, "place": problem.place}
