"""The files of benchmarks as they lie: rows of any store, and the JSON files that only benchmarks have.

Those are one object: a list below a key (`questions`, `data`), or records by their id (GQA, ScienceQA); VQAv2 and
OK-VQA have the questions in one file and the annotations in another.
"""

from __future__ import annotations

import json
import re
from collections import Counter
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
from minimind_v.core.rows.splits import ALL, SCORE, choose
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
    records = _records(find_rows(data), split, say)
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
        self, path: Path, records: list[Any], images: Path | None, read: Callable[[Mapping[str, Any]], Row]
    ) -> None:
        super().__init__(path, images)
        self._records = records
        self.read = read

    def __len__(self) -> int:
        return len(self._records)

    def row(self, index: int) -> Row:
        record = self._records[index]
        if not isinstance(record, dict):
            raise RowError("a record that is not an object of fields", "json")
        return self.read(record)


def read_picture(rows: RowStore, row: Row, index: int, position: int, name: str) -> bytes:
    """The bytes of a picture that the row names, or of which it has the id. Raises RowError."""
    try:
        return rows.picture(index, position, name)
    except RowError as error:
        if error.kind != "image missing" or (Path(name).suffix.lower() in ENDINGS and "pid" not in row.extra):
            raise
        for other in _other_names(row, name):
            try:
                return rows.picture(index, position, other)
            except RowError as second:
                if second.kind != "image missing":
                    raise
        raise error


def _other_names(row: Row, name: str) -> list[str]:
    fields = row.extra
    if "pid" in fields:  # ScienceQA has a folder for each question
        return [f"{fields.get('split')}/{fields['pid']}/{name}", f"{fields['pid']}/{name}"]
    is_number = name.isascii() and name.isdigit() and len(name) <= COCO_DIGITS
    numbered = [form.format(int(name)) for form in COCO_NAMES] if is_number else []
    return [*numbered, *(name + ending for ending in ENDINGS)]


def _records(path: Path, split: str | None, say: Callable[[str], None]) -> list[Any] | None:
    """The records of a file that only a benchmark has, some of them perhaps no objects; None for any other."""
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
        first = next(filter(_is_object, records), None) if isinstance(records, list) else None
        if first is not None:
            if "caption" in first or "conversations" in first:
                return None
            return _joined(path, key, records, first, value)
    objects = [record for record in value.values() if record is not None]
    if not objects or not all(_is_object(record) and "question" in record for record in objects):
        return None
    by_id = [record and {**record, _id_name(record): name} for name, record in value.items()]
    sizes = Counter(record["split"] for record in objects if isinstance(record.get("split"), str))
    if not sizes and split in (None, ALL):
        return by_id
    choice = choose(path, sizes, split, SCORE, "question")
    if choice.notice:
        say(choice.notice)
    return [record for record in by_id if record is None or choice.name in (ALL, record.get("split"))]


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _id_name(record: Mapping[str, Any]) -> str:
    return "pid" if "choices" in record else "question_id"  # ScienceQA, GQA


def _joined(path: Path, key: str, records: list[Any], first: dict[str, Any], whole: dict[str, Any]) -> list[Any]:
    """The questions with their annotations, which VQAv2 and OK-VQA have in two files; `first` is the first object.

    Raises MissingInput or DataError.
    """
    kinds = whole.get("question_type")  # SEED-Bench: numbers by name
    if isinstance(kinds, dict):
        by_number = {str(number): name for name, number in kinds.items()}
        return [
            {"kind": by_number.get(str(record.get("question_type_id")), ""), **record} if _is_object(record) else record
            for record in records
        ]
    alone = "question" in first and any(name in first for name in ("answer", "answers", "label"))
    if alone or "question_id" not in first:
        return records
    others = {_id_of(record): record for record in _find_other(path, key) if _id_of(record) is not None}
    if not any(_id_of(record) in others for record in records):
        raise DataError(f"{path}: no question_id has its other half in the file beside it")
    return [{**others.get(_id_of(record), {}), **record} if _is_object(record) else record for record in records]


def _id_of(record: Any) -> str | None:
    """The id of a question as text, which the two files may write as a number or a text; None without one."""
    value = record.get("question_id") if isinstance(record, dict) else None
    return str(value) if isinstance(value, str | int) else None


def _find_other(path: Path, key: str) -> list[Any]:
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
