"""Check every row for every problem that training would meet.

The check reads rows by the functions of training, so the two cannot disagree. `KINDS` lists what training does about
each kind of problem.
"""

from __future__ import annotations

import heapq
import pickle
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minimind_v.core.curate.count import NO_LIMIT
from minimind_v.core.curate.workers import each_row
from minimind_v.core.data.dataset import BrokenRow, RowDataset
from minimind_v.core.data.images import is_dark_on_transparent
from minimind_v.core.errors import RowError
from minimind_v.core.rows.digests import Digests, picture_digest, text_digest, whole_digest
from minimind_v.core.rows.forms import check_form
from minimind_v.core.rows.heldout import digests_of
from minimind_v.core.rows.row import NOTES, Row, RowStore, describe_notes, describe_text_rows

SKIPPED, CUT, TRAINED = "skips the row", "cuts the row", "still uses the row"
KINDS = {  # what training does about a row with this problem; it skips rows with any other problem
    "cut": CUT,
    "unanswered": CUT,
    "empty answer": TRAINED,
    "unused image": TRAINED,
    "dark on transparent": TRAINED,
    "duplicate row": TRAINED,
    "duplicate image": TRAINED,
    "held out": TRAINED,
}
DARK_ON_TRANSPARENT = "dark on a transparent background, which becomes black in training — save it on white"
PACK = 4096  # findings that are compressed together
EXAMPLES = 3  # rows of each kind in a summary


@dataclass(frozen=True)
class Problem:
    """A problem of a row."""

    row: int  # its number from 1, in JSONL its line
    kind: str
    message: str
    location: str  # file:row

    @property
    def training(self) -> str:
        """What training does about it."""
        return KINDS.get(self.kind, SKIPPED)


Finding = tuple[int, str, str]  # index of a row, kind and message of a problem


class Packed:
    """Findings, compressed. A hundred thousand messages that differ in a number take 1 MB."""

    def __init__(self) -> None:
        self._packs: list[bytes] = []
        self._loose: list[Finding] = []

    def append(self, item: Finding) -> None:
        self._loose.append(item)
        if len(self._loose) == PACK:
            self._packs.append(zlib.compress(pickle.dumps(self._loose), 1))
            self._loose = []

    def __iter__(self) -> Iterator[Finding]:
        for pack in self._packs:
            yield from pickle.loads(zlib.decompress(pack))
        yield from self._loose


@dataclass
class CheckedRow:
    """The result of one row's check."""

    index: int
    problems: list[tuple[str, str]] = field(default_factory=list)  # kind and message
    whole: int | None = None  # digest of text and pictures, if all of them are readable
    digests: list[int] = field(default_factory=list)  # of each picture with a mark or, without any, of the text
    text_row: bool = False  # it has pictures and no mark
    notes: tuple[str, ...] = ()  # how its reading differs from its text


class Report:
    """The problems of a set of rows; of a row without problems it has numbers only."""

    def __init__(self, rows: RowStore, held_out: RowStore | None = None) -> None:
        self._store, self._held_out = rows, held_out
        self._findings = Packed()
        self._wholes, self._digests = Digests(), Digests()
        count = len(rows)
        self.skipped = np.zeros(count, bool)  # [rows]: training would skip these
        self.repeated = np.zeros(count, bool)  # [rows]: copies of earlier rows or of held-out ones
        self.whole = np.zeros(count, bool)  # [rows]: complete and not skipped, so that they can be copied
        self.text_rows = np.zeros(count, bool)  # [rows]: with pictures and no mark; no problem
        self.notes = {note: np.zeros(count, bool) for note in NOTES}  # [rows] by note; no problem either
        # Index of the row with the same text and pictures, with one of the pictures, and of the held-out one; or -1.
        self._first_copy, self._first_shown, self._held_out_copy = (np.full(count, -1, np.int64) for _ in range(3))

    @property
    def rows(self) -> int:
        return len(self.skipped)

    def add(self, row: CheckedRow) -> None:
        """Add the next row."""
        self.text_rows[row.index] = row.text_row
        for note in row.notes:
            self.notes[note][row.index] = True
        for kind, message in row.problems:
            self._findings.append((row.index, kind, message))
            if kind not in KINDS:
                self.skipped[row.index] = True
        if row.whole is not None and not self.skipped[row.index]:  # what is skipped repeats nothing
            self.whole[row.index] = True
            self._wholes.add(row.index, row.whole)
            for digest in row.digests:
                self._digests.add(row.index, digest)

    def compare(self, held_out: Digests) -> None:
        """Find repeated rows, after all rows were added."""
        self._first_copy = self._wholes.earlier_copies(self.rows)
        self._first_shown = np.where(self._first_copy < 0, self._digests.earlier_copies(self.rows), -1)
        self._held_out_copy = self._digests.copies_in(held_out, self.rows)
        self.repeated = (self._first_copy >= 0) | (self._held_out_copy >= 0)

    def location(self, index: int) -> str:
        """`file:row`."""
        return self._store.location(index)

    def problems(self) -> Iterator[Problem]:
        """All problems, in the order of the rows."""
        for index, kind, message in heapq.merge(self._findings, self._repetitions(), key=lambda finding: finding[0]):
            yield Problem(self._store.number(index), kind, message, self._store.location(index))

    def _repetitions(self) -> Iterator[Finding]:
        for index in np.flatnonzero((self._first_shown >= 0) | self.repeated).tolist():
            if (first := self._first_copy[index]) >= 0:
                yield index, "duplicate row", f"the same text and images as {self._store.location(int(first))}"
            if (first := self._first_shown[index]) >= 0:
                yield index, "duplicate image", f"an image of {self._store.location(int(first))}"
            if self._held_out and (first := self._held_out_copy[index]) >= 0:
                yield index, "held out", f"shared with {self._held_out.location(int(first))}"

    def refusal(self, bad_rows: float) -> str | None:
        """Why training would refuse these rows; else None. `bad_rows` is the allowed share of broken rows."""
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
    """Check all rows in several processes. If a row crashes its process, a new one continues after it."""
    report = Report(dataset.rows, held_out)
    kept = _all_digests(held_out) if held_out else Digests()
    for checked_row in each_row([check_row] * workers, dataset, _crashed):
        report.add(checked_row)
        if checked_row.index % 100 == 99 or checked_row.index + 1 == len(dataset):
            progress(checked_row.index + 1, len(dataset))
    report.compare(kept)
    return report


def _crashed(index: int) -> CheckedRow:
    return CheckedRow(index, [("crash", "reading this row crashed the process")])


def _all_digests(rows: RowStore) -> Digests:
    """Each picture of a set, and the text of each row without any."""
    digests = Digests()
    for index in range(len(rows)):
        with suppress(RowError):  # an unreadable row has no copies
            for digest in digests_of(rows, index):
                digests.add(index, digest)
    return digests


# --- one row ----------------------------------------------------------------------------------------------------------


def check_row(dataset: RowDataset, index: int) -> CheckedRow:
    """Find all problems of one row."""
    checked = CheckedRow(index)
    try:
        row = check_form(dataset.rows.row(index))
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
                dataset.pixels(data, name)
                if position < used and is_dark_on_transparent(data):
                    checked.problems.append(("dark on transparent", f"{name}: {DARK_ON_TRANSPARENT}"))
        except RowError as error:
            if checked.text_row:
                checked.problems.append(("unused image", f"{error} (in a text row, so training does not read it)"))
            elif position >= used:  # training does not read it
                checked.problems.append(("cut", f"{error} (in a turn that is cut off)"))
            else:
                checked.problems.append((error.kind, str(error)))
            if error.kind == "placeholders":
                break  # the message is for all pictures
    if len(pictures) == len(row.images):
        text = text_digest(row)
        checked.whole, checked.digests = whole_digest(text, pictures), (pictures if row.shown else []) or [text]
    return checked


def _check_text(dataset: RowDataset, index: int, row: Row, checked: CheckedRow) -> int:
    """Add the problems of the text. Returns how many of the row's pictures training would read."""
    if isinstance(row.conversations, list):
        for number, message in enumerate(row.conversations, 1):
            if not isinstance(message, dict) or message.get("role") != "assistant" or message.get("tool_calls"):
                continue
            content = message.get("content")
            if isinstance(content, str) and not content.strip():
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
    """The report as JSON for programs, its problems by kind."""
    counts: Counter[str] = Counter()
    first: dict[str, list[Problem]] = {}
    for problem in report.problems():
        counts[problem.kind] += 1
        if len(examples := first.setdefault(problem.kind, [])) < EXAMPLES:
            examples.append(problem)
    refusal, text_rows = report.refusal(bad_rows), int(report.text_rows.sum())
    return {
        "rows": report.rows,
        "usable": report.rows - int(report.skipped.sum()),
        "ok": refusal is None,
        "refusal": refusal,
        "kinds": {
            kind: {
                "count": count,
                "training": first[kind][0].training,
                "first": [problem.location for problem in first[kind]],
                "message": first[kind][0].message,
            }
            for kind, count in counts.most_common()
        },
        "text_rows": _noted(report, report.text_rows, describe_text_rows(text_rows, report.rows) if text_rows else ""),
        "notes": {
            note: _noted(report, mask, describe_notes({note: int(mask.sum())}, report.rows)[0])
            for note, mask in report.notes.items()
            if mask.any()
        },
    }


def _noted(report: Report, mask: np.ndarray, message: str) -> dict[str, Any]:
    """Rows that are read, but not as one may expect, as JSON for programs; bool [rows]."""
    indices = np.flatnonzero(mask).tolist()
    return {
        "count": len(indices),
        "first": [report.location(index) for index in indices[:EXAMPLES]],
        "message": message,
    }


def as_json(problem: Problem) -> dict[str, Any]:
    """A problem as JSON for programs."""
    return {"row": problem.row, "kind": problem.kind, "message": problem.message, "place": problem.location}
