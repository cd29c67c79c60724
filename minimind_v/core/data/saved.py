"""Rows of a folder that `datasets` has saved (`save_to_disk`), by the optional extra of that name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimind_v.core.data.parquet import PICTURES, TALK
from minimind_v.core.data.pictures import open_pictures
from minimind_v.core.data.row import Row, as_messages, image_names, parse_talk, picture_bytes
from minimind_v.core.data.splits import ALL, LEARN, Choice, choose
from minimind_v.core.data.unread import refuse_unread
from minimind_v.core.errors import DataError, MissingInput, UsageError


class SavedRows:
    """A saved dataset, or one of the splits of a saved set of them. Its files are mapped, not read."""

    left_out = ""

    def __init__(
        self, path: Path, images: Path | None = None, split: str | None = None, order: Sequence[str] = LEARN
    ) -> None:
        """`split` and `order` say which one of several.

        Raises MissingInput where the library is not installed, DataError where the folder is something else or its
        splits do not go together, UsageError where there is no such split.
        """
        try:
            import datasets
        except ImportError:
            raise MissingInput(f"{path}: reading it needs an extra — pip install 'minimind-v[datasets]'") from None
        self.path = path
        try:
            found = datasets.load_from_disk(str(path))
        except Exception as error:  # the library raises many kinds
            raise DataError(f"{path}: not a saved dataset ({' '.join(str(error).split())})") from None
        self._folder, self.choice = path, Choice("")
        if isinstance(found, datasets.DatasetDict):
            self.choice = choose(path, {name: len(rows) for name, rows in found.items()}, split, order, "row")
            together = self.choice.name == ALL
            found = _together(path, list(found.values())) if together else found[self.choice.name]
            self._folder = path if together else path / self.choice.name
        elif split is not None:
            raise UsageError(f"--split {split}: {path} is one split by itself — leave --split out")
        self._talk = next((name for name in TALK if name in found.column_names), "")
        if not self._talk:
            raise DataError(f"{path}: no column `conversations`, only {', '.join(found.column_names)}")
        if not len(found):
            raise DataError(f"{path}: the dataset has no rows")
        # The bytes of a picture as they are: decoding is our own business, with its limits. Videos are not read.
        for name in [name for name, kind in found.features.items() if isinstance(kind, datasets.Video)]:
            found = found.cast_column(name, datasets.Video(decode=False))
        kinds = {name: kind for name, kind in found.features.items() if _is_picture(kind)}
        for name, kind in kinds.items():
            plain = datasets.Image(decode=False)
            found = found.cast_column(name, plain if isinstance(kind, datasets.Image) else datasets.List(plain))
        self._bytes = next((name for name in PICTURES if name in kinds or _is_binary(found.features.get(name))), "")
        self._names = "image" if "image" in found.column_names and self._bytes != "image" else ""
        self._rows = found
        self._texts = found.select_columns([name for name in found.column_names if name != self._bytes])
        self._images = open_pictures(None if self._bytes else images)

    @property
    def split(self) -> str:
        return self.choice.name

    @property
    def pictures(self) -> Path | None:
        return self._images.path

    def __len__(self) -> int:
        return len(self._rows)

    def number(self, index: int) -> int:
        return index + 1

    def place(self, index: int) -> str:
        return f"{self._folder}:{index + 1}"

    def row(self, index: int) -> Row:
        found = dict(self._texts[index])
        conversations = found.pop(self._talk)
        if isinstance(conversations, str):
            conversations = parse_talk(conversations, self._talk)
        told = image_names(found.pop(self._names, None)) if self._names else []
        if self._bytes:
            count = len(self._cells(index))
            told = told if len(told) == count else [f"picture {n}" for n in range(1, count + 1)]
        extra = {key: value for key, value in found.items() if value is not None}
        return refuse_unread(Row(as_messages(conversations), told, extra))

    def _cells(self, index: int) -> list[Any]:
        cell = self._rows[index][self._bytes]
        return cell if isinstance(cell, list) else [] if cell is None else [cell]

    def picture(self, index: int, position: int, name: str) -> bytes:
        if self._bytes:
            return picture_bytes(self._cells(index)[position], name)
        return self._images.read(name)

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self))


def _together(path: Path, parts: list[Any]) -> Any:
    import datasets

    try:
        return datasets.concatenate_datasets(parts)
    except Exception as error:  # the library raises many kinds
        raise DataError(f"{path}: its splits do not go together ({' '.join(str(error).split())})") from None


def _is_picture(feature: Any) -> bool:
    import datasets

    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _is_binary(feature: Any) -> bool:
    return getattr(getattr(feature, "feature", feature), "dtype", None) in ("binary", "large_binary")
