"""Every row against everything that can go wrong with it, before a run finds out in its third hour.

A row is read as training reads it, by the same functions, so the two cannot disagree. What training would do about each
kind of problem stands in `KINDS`.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from minimind_v.core.data.dataset import BrokenRow, RowDataset
from minimind_v.core.data.images import load_pixels
from minimind_v.core.data.row import Row, RowStore
from minimind_v.core.errors import RowError

SKIPPED, CUT, TRAINED = "skips the row", "cuts the row", "trains on it all the same"
KINDS = {  # what training does about a row with this problem; every other kind that a row can have is skipped
    "cut": CUT,
    "unanswered": CUT,
    "empty answer": TRAINED,
    "duplicate row": TRAINED,
    "duplicate picture": TRAINED,
    "held out": TRAINED,
}
TOGETHER = 32  # rows that a process checks at a time
NO_LIMIT = 2**31  # tokens


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


@dataclass
class Found:
    """What one process found out about one row."""

    index: int
    problems: list[tuple[str, str]] = field(default_factory=list)  # kind and message
    text: bytes = b""  # digests: of the conversation, and of each picture
    pictures: list[bytes] = field(default_factory=list)


@dataclass
class Report:
    """What is wrong with a set of rows."""

    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)  # indices of rows that training would skip
    repeated: set[int] = field(default_factory=set)  # indices of rows that stand earlier too, or in the held-out file

    def refusal(self, bad_rows: float) -> str | None:
        """Why training would refuse these rows, if it would; `bad_rows` is the share of broken ones that it allows."""
        if len(self.skipped) == self.rows:
            return "no row can be used"
        if len(self.skipped) > bad_rows * self.rows:
            return f"{len(self.skipped)} of {self.rows} rows are broken, more than {bad_rows:.0%}"
        return None


def check(
    dataset: RowDataset,
    workers: int,
    held_out: RowStore | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Check all rows in several processes. A process that a row kills is replaced, and the row named."""
    report = Report(len(dataset))
    kept = _digests_of(held_out) if held_out else {}
    rows: dict[bytes, str] = {}  # digest → where it stood first
    shown: dict[bytes, str] = {}
    for found in _find_all(dataset, workers):
        place = dataset.rows.place(found.index)
        problems = list(found.problems)
        if found.text:
            whole = hashlib.blake2b(b"".join([found.text, *found.pictures]), digest_size=16).digest()
            if (first := rows.setdefault(whole, place)) != place:
                problems.append(("duplicate row", f"the same text and pictures as {first}"))
                report.repeated.add(found.index)
            elif seen := next((shown[digest] for digest in found.pictures if digest in shown), None):
                problems.append(("duplicate picture", f"a picture of {seen}"))
            for digest in found.pictures:
                shown.setdefault(digest, place)
            if shared := next((kept[digest] for digest in found.pictures or [found.text] if digest in kept), None):
                problems.append(("held out", f"shared with {shared}"))
                report.repeated.add(found.index)
        for kind, message in problems:
            report.problems.append(Problem(dataset.rows.number(found.index), kind, message, place))
            if kind not in KINDS:
                report.skipped.add(found.index)
        if found.index % 100 == 99 or found.index + 1 == len(dataset):
            progress(found.index + 1, len(dataset))
    return report


def text_digest(row: Row) -> bytes:
    """A digest of a conversation."""
    return hashlib.blake2b(json.dumps(row.conversations, sort_keys=True).encode(), digest_size=16).digest()


def picture_digest(data: bytes) -> bytes:
    """A digest of a picture's bytes."""
    return hashlib.blake2b(data, digest_size=16, person=b"picture").digest()


def _digests_of(rows: RowStore) -> dict[bytes, str]:
    """Each picture of a set, and the text of each row without any, and where it stands."""
    found: dict[bytes, str] = {}
    for index in range(len(rows)):
        try:
            row = rows.row(index)
            names = enumerate(row.images)
            digests = [picture_digest(rows.picture(index, position, name)) for position, name in names]
        except RowError:
            continue  # it is nobody's copy
        for digest in digests or [text_digest(row)]:
            found.setdefault(digest, rows.place(index))
    return found


# --- one row ----------------------------------------------------------------------------------------------------------


def check_row(dataset: RowDataset, index: int) -> Found:
    """All that can be told of one row."""
    found = Found(index)
    try:
        row = dataset.rows.row(index)
    except RowError as error:
        found.problems.append((error.kind, str(error)))
        return found
    used = _check_text(dataset, index, row, found)
    for position, name in enumerate(row.images):
        try:
            data = dataset.rows.picture(index, position, name)
            found.pictures.append(picture_digest(data))
            load_pixels(data, name, dataset.image_size)
        except RowError as error:
            if position >= used:  # training never looks at it
                found.problems.append(("cut", f"{error} (in a part that is cut off)"))
            else:
                found.problems.append((error.kind, str(error)))
            if error.kind == "placeholders":
                break  # says it of all
    if len(found.pictures) == len(row.images):
        found.text = text_digest(row)
    return found


def _check_text(dataset: RowDataset, index: int, row: Row, found: Found) -> int:
    """How many of the row's pictures training would read."""
    if isinstance(row.conversations, list):
        for number, message in enumerate(row.conversations, 1):
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, str) and message.get("role") == "assistant" and not content.strip():
                found.problems.append(("empty answer", f"message {number}, an answer, is empty"))
    try:
        whole = dataset.encoder.row(row.conversations, len(row.images), NO_LIMIT)
    except RowError as error:
        found.problems.append((error.kind, str(error)))
        return len(row.images)
    if row.conversations[-1]["role"] == "user":
        found.problems.append(("unanswered", "the last question has no answer: it is left out"))
    if len(whole) <= dataset.max_length:
        return whole.images
    kept = dataset.text(index)
    if isinstance(kept, BrokenRow):
        found.problems.append((kept.kind, kept.message))
        return len(row.images)
    lost = sum(whole.loss_mask) - sum(kept.tokens.loss_mask)
    found.problems.append(
        ("cut", f"{len(whole)} tokens where {dataset.max_length} fit: {lost} tokens of answers are cut off")
    )
    return kept.tokens.images


# --- many processes ---------------------------------------------------------------------------------------------------

_dataset: RowDataset  # of a worker process


def _start(dataset: RowDataset) -> None:
    global _dataset
    _dataset = dataset


def _check_some(begin: int, end: int) -> list[Found]:
    return [check_row(_dataset, index) for index in range(begin, end)]


def _pool(dataset: RowDataset, workers: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit whatever threads the libraries have
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(dataset,))


def _find_all(dataset: RowDataset, workers: int) -> Iterator[Found]:
    """What is found of each row, in the order of the rows."""
    spans = [(begin, min(begin + TOGETHER, len(dataset))) for begin in range(0, len(dataset), TOGETHER)]
    at = 0
    while at < len(spans):
        with _pool(dataset, workers) as pool:
            waiting: list[Future[list[Found]]] = []
            ahead = at
            try:
                while at < len(spans):
                    while ahead < len(spans) and len(waiting) < 4 * workers:
                        waiting.append(pool.submit(_check_some, *spans[ahead]))
                        ahead += 1
                    yield from waiting[0].result()
                    del waiting[0]
                    at += 1
            except BrokenProcessPool:
                pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if at < len(spans):  # a process died over one of the rows that were under way: go through this span by rows
            yield from _one_by_one(dataset, *spans[at])
            at += 1


def _one_by_one(dataset: RowDataset, begin: int, end: int) -> Iterator[Found]:
    pool = _pool(dataset, 1)
    try:
        for index in range(begin, end):
            try:
                yield pool.submit(_check_some, index, index + 1).result()[0]
            except BrokenProcessPool:
                yield Found(index, [("crash", "reading the row ended the process that read it")])
                pool = _pool(dataset, 1)
    finally:
        pool.shutdown(cancel_futures=True)


def summary(report: Report, bad_rows: float) -> dict[str, Any]:
    """The report for a program to read."""
    kinds: dict[str, Any] = {}
    for problem in report.problems:
        kind = kinds.setdefault(problem.kind, {"count": 0, "training": problem.training, "first": []})
        kind["count"] += 1
        if len(kind["first"]) < 3:
            kind["first"].append(problem.place)
    refusal = report.refusal(bad_rows)
    return {
        "rows": report.rows,
        "usable": report.rows - len(report.skipped),
        "ok": refusal is None,
        "refusal": refusal,
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["count"])),
        "problems": [
            {"row": problem.row, "kind": problem.kind, "message": problem.message, "place": problem.place}
            for problem in report.problems
        ],
    }
