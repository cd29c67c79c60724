"""The files of benchmarks as they lie: rows of any store, and the JSON files that only benchmarks have.

Those are one object: a list below a key (`questions`, `data`), or records by their id (GQA, ScienceQA); VQAv2 and
OK-VQA have the questions in one file and the annotations in another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from minimind_v.core.errors import DataError, MissingInput, RowError, nearest
from minimind_v.core.evaluate.questions import QuestionReader
from minimind_v.core.evaluate.template import Template
from minimind_v.core.rows.file_rows import FileRows
from minimind_v.core.rows.json_layout import HEAD
from minimind_v.core.rows.row import Row, RowStore
from minimind_v.core.rows.splits import SCORE
from minimind_v.core.rows.stores import find_rows, open_rows

LISTS = ("questions", "annotations", "data")  # keys of a list of records
# The names of picture files whose ids alone a file gives: of COCO with its zeros, of others with an ending.
COCO_NAMES = ("COCO_val2014_{:012d}.jpg", "COCO_train2014_{:012d}.jpg", "COCO_test2015_{:012d}.jpg", "{:012d}.jpg")
COCO_DIGITS = 12
ENDINGS = (".jpg", ".png", ".jpeg", ".webp")


def open_benchmark(
    data: Path,
    images: Path | None = None,
    split: str | None = None,
    say: Callable[[str], None] = lambda message: None,
    names: Mapping[str, Template] | None = None,
) -> RowStore:
    """The rows of a benchmark; `names` gives values of a row under the names that `questions` reads.

    Raises MissingInput, DataError (also for a field of `names` that no row has) or UsageError.
    """
    read = QuestionReader(names or {})
    records = _records(find_rows(data), split)
    if records is not None:
        rows: RowStore = JsonRecords(data, records, images, read)
    else:
        rows = open_rows(data, images, split, say, SCORE)
        rows.read = read  # type: ignore[attr-defined]
    _refuse_absent(rows, read)
    return rows


def _refuse_absent(rows: RowStore, read: QuestionReader) -> None:
    """Raises DataError for named fields that no row has. It reads rows until each field has occurred."""
    for index in range(len(rows)):
        if not read.absent:
            return
        with suppress(RowError):
            rows.row(index)
    if read.absent:
        missing = ", ".join(f"`{own}` (for {name}){nearest(own, read.present)}" for own, name in read.absent.items())
        raise DataError(f"{rows.path}: no row has the field {missing} — rows have {', '.join(sorted(read.present))}")


class JsonRecords(FileRows):
    """Records of a JSON file, all in memory."""

    file_kind = "JSON of a benchmark"

    def __init__(
        self, path: Path, records: list[dict[str, Any]], images: Path | None, read: Callable[[Mapping[str, Any]], Row]
    ) -> None:
        super().__init__(path, images)
        self._records = records
        self.read = read

    def __len__(self) -> int:
        return len(self._records)

    def row(self, index: int) -> Row:
        return self.read(self._records[index])


def read_picture(rows: RowStore, row: Row, index: int, position: int, name: str) -> bytes:
    """The bytes of a picture that the row names, or of which it has the id. Raises RowError."""
    try:
        return rows.picture(index, position, name)
    except RowError as error:
        if error.kind != "picture missing" or (Path(name).suffix.lower() in ENDINGS and "pid" not in row.extra):
            raise
        for other in _other_names(row, name):
            try:
                return rows.picture(index, position, other)
            except RowError as second:
                if second.kind != "picture missing":
                    raise
        raise error


def _other_names(row: Row, name: str) -> list[str]:
    fields = row.extra
    if "pid" in fields:  # ScienceQA has a folder for each question
        return [f"{fields.get('split')}/{fields['pid']}/{name}", f"{fields['pid']}/{name}"]
    is_number = name.isascii() and name.isdigit() and len(name) <= COCO_DIGITS
    numbered = [form.format(int(name)) for form in COCO_NAMES] if is_number else []
    return [*numbered, *(name + ending for ending in ENDINGS)]


def _records(path: Path, split: str | None) -> list[dict[str, Any]] | None:
    """The records of a file that only a benchmark has; None for any other."""
    if not path.is_file() or path.suffix != ".json":
        return None
    with path.open("rb") as file:
        head = file.read(HEAD).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head.startswith(b"{"):
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return None  # rows, one after the other
    for key in LISTS:
        records = value.get(key)
        if isinstance(records, list) and records and isinstance(records[0], dict):
            if "caption" in records[0] or "conversations" in records[0]:
                return None
            return _joined(path, key, records, value)
    by_id = [{**record, _id_name(record): name} for name, record in value.items() if isinstance(record, dict)]
    if len(by_id) == len(value) > 0 and all("question" in record for record in by_id):
        splits = {record.get("split") for record in by_id}
        if split is not None and split not in splits:
            raise DataError(f"{path}: no question of the split {split!r} — it has {', '.join(map(str, splits))}")
        return [record for record in by_id if split is None or record.get("split") == split]
    return None


def _id_name(record: Mapping[str, Any]) -> str:
    return "pid" if "choices" in record else "question_id"  # ScienceQA, GQA


def _joined(path: Path, key: str, records: list[dict[str, Any]], whole: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions with their annotations, which VQAv2 and OK-VQA have in two files.

    Raises MissingInput or DataError.
    """
    kinds = whole.get("question_type")  # SEED-Bench: numbers by name
    if isinstance(kinds, dict):
        by_number = {number: name for name, number in kinds.items()}
        return [{"kind": by_number.get(record.get("question_type_id"), ""), **record} for record in records]
    alone = "question" in records[0] and any(name in records[0] for name in ("answer", "answers", "label"))
    if alone or "question_id" not in records[0]:
        return records
    other = _find_other(path, key)
    others = {record.get("question_id"): record for record in other}
    if not any(record.get("question_id") in others for record in records):
        raise DataError(f"{path}: no question_id has its other half in the file beside it")
    return [{**others.get(record["question_id"], {}), **record} for record in records]


def _find_other(path: Path, key: str) -> list[dict[str, Any]]:
    """The other half beside a file of questions or annotations: the file with the most similar name."""
    other_key = "annotations" if key == "questions" else "questions"

    def stem(name: str) -> set[str]:
        return set(re.split(r"[_\W]+", name)) - {"questions", "annotations", "OpenEnded", "json"}

    beside = [file for file in path.parent.glob("*.json") if file != path and other_key in file.name.lower()]
    for file in sorted(beside, key=lambda file: (len(stem(file.name) ^ stem(path.name)), file.name)):
        try:
            records = json.loads(file.read_text(encoding="utf-8-sig")).get(other_key)
        except (ValueError, RecursionError, AttributeError):
            continue
        if isinstance(records, list):
            return records
    raise MissingInput(f"{path} has only the {key} — put the file with the {other_key} beside it")
