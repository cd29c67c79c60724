"""Rows from COCO caption files: one row per caption.

`{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`, and Karpathy's
`{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}`. One pass over the file finds the span of each
caption and of its image entry; the index keeps these two numbers per row.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minimind_v.core.errors import DataError, RowError, UsageError
from minimind_v.core.rows.field_names import TALKS
from minimind_v.core.rows.json_layout import CHUNK, DECODER, JsonText
from minimind_v.core.rows.jsonl import TextRows
from minimind_v.core.rows.members import hash_bytes
from minimind_v.core.rows.row import Row, parse_json
from minimind_v.core.rows.splits import ALL, LEARN, WORDS, choose, split_of

HEAD = 2**22  # bytes that show whether a file may hold captions
LENGTH_BITS = 24  # of a span: the length, at most 16 MiB; the bits above are the offset
SENTENCE_BITS = 32  # of a sentence: its number; the bits above are its split
UNKNOWN, SEVERAL = 0, 1  # instead of an image's span: no image has this id, or several have
NO_ID = 1 << 62
SPLITS = list(WORDS)
LISTS = re.compile(rb'"(?:images|annotations)"\s*:\s*\[\s*\{[^}]{0,2000}"(?:file_?name|image_id|id)"')


def is_captions(path: Path) -> bool:
    """Whether a JSON file is one object of images or annotations, judged by its beginning."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return False
    return LISTS.search(head) is not None and not any(f'"{key}"'.encode() in head for key in TALKS)


class CocoRows(TextRows):
    """Rows of COCO's captions, or of one split of Karpathy's. The index takes 16 bytes per row."""

    kind = "COCO captions: place of the caption, place of the image"

    def __init__(
        self, path: Path, images: Path | None = None, split: str | None = None, order: Sequence[str] = LEARN
    ) -> None:
        """`split` and `order` select Karpathy's split. Raises MissingInput, DataError or UsageError."""
        super().__init__(path, images)
        self._rows = np.arange(len(self._index))
        self._sentences = bool(int(self._index.array[1, 0]) >> 63)
        if not self._sentences and split is not None:
            raise UsageError(f"--split {split}: {path} has no splits — leave --split out")
        if self._sentences:
            codes = (np.asarray(self._index.array[1]) >> np.uint64(SENTENCE_BITS)).astype(np.int64) & 0xFF
            counts = np.bincount(codes, minlength=len(SPLITS)).tolist()
            sizes = {name: count for name, count in zip(SPLITS, counts, strict=True) if count}
            self.choice = choose(path, sizes, split, order, "row")
            if self.choice.name != ALL:
                self._rows = np.flatnonzero(codes == SPLITS.index(self.choice.name))

    @property
    def file_kind(self) -> str:  # type: ignore[override]
        return "Karpathy's captions" if self._sentences else "COCO captions"

    def __len__(self) -> int:
        return len(self._rows)

    def number(self, index: int) -> int:
        return int(self._rows[index]) + 1

    def row(self, index: int) -> Row:
        first, second = (int(number) for number in self._index.array[:, self._rows[index]])
        return self.read(self._sentence(first, second) if self._sentences else self._annotation(first, second))

    def picture(self, index: int, position: int, name: str) -> bytes:
        try:
            return super().picture(index, position, name)
        except RowError as error:
            if error.kind == "image missing" and self._sentences and "/" in name:  # `filepath` is often absent
                return super().picture(index, position, name.rpartition("/")[2])
            raise

    def _annotation(self, span: int, image_span: int) -> dict[str, Any]:
        annotation = self._object(span)
        if annotation.get("image_id") is None:
            raise RowError("an annotation without `image_id`", "coco")
        if image_span in (UNKNOWN, SEVERAL):
            count = "several images have" if image_span else "no image has"
            raise RowError(f"{count} the id {annotation['image_id']!r:.60}", "coco")
        name = self._object(image_span).get("file_name")
        if not isinstance(name, str) or not name:
            raise RowError(f"the image {annotation['image_id']!r:.60} has no `file_name`", "coco")
        return annotation | {"image": [name]}

    def _sentence(self, span: int, number: int) -> dict[str, Any]:
        image = self._object(span)
        sentences = image.get("sentences")
        number &= 0xFFFFFFFF
        if not isinstance(sentences, list) or len(sentences) <= number or not isinstance(sentences[number], dict):
            raise RowError("a sentence that is not an object with `raw`", "coco")
        folder, name = image.get("filepath"), image.get("filename") or image.get("file_name")
        if not isinstance(name, str):
            raise RowError("an image without `filename`", "coco")
        names = [f"{folder}/{name}" if isinstance(folder, str) and folder else name]
        return {"image": names, "caption": sentences[number].get("raw")}

    def _object(self, span: int) -> dict[str, Any]:
        """The JSON object at a span of the file. Raises RowError."""
        self.handle.seek(span >> LENGTH_BITS)
        value = parse_json(self.handle.read(span & ((1 << LENGTH_BITS) - 1)))
        if not isinstance(value, dict):
            raise RowError("not a JSON object", "json")
        return value

    def _find_rows(self) -> np.ndarray:
        """The span of every caption, and that of its image. Raises DataError."""
        scan = _Scan()
        try:
            with self.path.open("rb") as file:
                for key, value, span in _elements(JsonText(file)):
                    scan.add(key, value, span)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: not a COCO caption file ({error})") from None
        if len(scan.sentences) and not scan.captions:
            return _columns(scan.sentences, 2)
        if not scan.captions:
            raise DataError(
                f"{self.path}: no annotation has a `caption` — use COCO's caption files, "
                "such as captions_train2017.json"
            )
        return scan.annotation_spans()


@dataclass
class _Scan:
    """The images, annotations and sentences of a file, as numbers only: there may be millions."""

    images: array[int] = field(default_factory=lambda: array("Q"))  # id, digest of the name and span of each
    annotations: array[int] = field(default_factory=lambda: array("Q"))  # id of its image and span of each
    sentences: array[int] = field(default_factory=lambda: array("Q"))  # span of its image, split and number of each
    captions: int = 0

    def add(self, key: str, value: Any, span: int) -> None:
        fields = value if isinstance(value, dict) else {}
        if key == "annotations":
            self.annotations.extend((_id(fields["image_id"]) if fields.get("image_id") is not None else NO_ID, span))
            self.captions += isinstance(fields.get("caption"), str)
        elif key == "images":
            if fields.get("id") is not None:
                self.images.extend((_id(fields["id"]), _digest(repr(fields.get("file_name"))), span))
            sentences = fields.get("sentences")
            if isinstance(sentences, list):
                split = _split_code(fields.get("split"))
                for number in range(len(sentences)):
                    self.sentences.extend((span, 1 << 63 | split << SENTENCE_BITS | number))

    def annotation_spans(self) -> np.ndarray:
        """The span of each annotation, and that of its image, or UNKNOWN or SEVERAL: uint64 [2, annotations]."""
        of, annotation_spans = _columns(self.annotations, 2)
        if not len(self.images):
            return np.stack([annotation_spans, np.full_like(annotation_spans, UNKNOWN)])
        images = _columns(self.images, 3)
        ids, names, image_spans = images[:, np.argsort(images[0], kind="stable")]
        distinct, firsts = np.unique(ids, return_index=True)
        differ = np.minimum.reduceat(names, firsts) != np.maximum.reduceat(names, firsts)
        spans = np.where(differ, np.uint64(SEVERAL), image_spans[firsts])
        which = np.minimum(np.searchsorted(distinct, of), len(distinct) - 1)
        return np.stack([annotation_spans, np.where(distinct[which] == of, spans[which], np.uint64(UNKNOWN))])


def _columns(numbers: array[int], count: int) -> np.ndarray:
    """Numbers that follow each other as `count` columns, uint64 [count, rows]."""
    return np.array(numbers, np.uint64).reshape(-1, count).T


def _id(value: Any) -> int:
    """An id as a number: 7, 7.0 and "7" are the same id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    return _digest(text) | 1 << 63


def _digest(text: str) -> int:
    return hash_bytes(text.encode("utf-8", "surrogatepass"))


def _split_code(split: Any) -> int:
    """The number of one of Karpathy's splits; `restval` is training data."""
    name = split_of(Path(split)) if isinstance(split, str) else None
    return SPLITS.index(name) if name else 0


def _elements(source: JsonText) -> Iterator[tuple[str, Any, int]]:
    """The elements of the arrays in a JSON object: key, value, span of each. Raises ValueError or RecursionError."""
    source.more(CHUNK)
    source.at = 3 * source.text.startswith("\xef\xbb\xbf")
    _take(source, "{")
    while (mark := source.next()) != "}":
        if mark != '"':
            raise ValueError(f"no key at byte {source.offset}")
        key, _ = _value(source)
        _take(source, ":")
        if source.next() != "[":
            _value(source)
            continue
        source.at += 1
        while source.next() != "]":
            value, span = _value(source)
            yield str(key), value, span
        source.at += 1
    source.at += 1
    if source.next():
        raise ValueError(f"extra data after its end, at byte {source.offset}")


def _take(source: JsonText, mark: str) -> None:
    if source.next() != mark:
        raise ValueError(f"no {mark} at byte {source.offset}")
    source.at += 1


def _value(source: JsonText) -> tuple[Any, int]:
    """The value that begins at the position, and its span. Raises ValueError."""
    while True:
        rest = len(source.text) - source.at
        try:
            value, end = DECODER.raw_decode(source.text, source.at)
            if end < len(source.text):  # a number at the end may continue
                begin, length, source.at = source.offset, end - source.at, end
                if length >> LENGTH_BITS:
                    raise ValueError(f"more than {1 << LENGTH_BITS:,} bytes in one value")
                return value, begin << LENGTH_BITS | length
            trouble = "it does not end"
        except json.JSONDecodeError as error:
            trouble = error.msg
        if rest >> LENGTH_BITS or not source.more(max(CHUNK, rest)):
            raise ValueError(f"{trouble}, in what begins at byte {source.offset}")
