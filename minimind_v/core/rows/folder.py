"""Rows in a folder with a metadata file beside the image files (`imagefolder` of `datasets`).

`metadata.jsonl`, `metadata.csv` or `metadata.parquet` is in the folder itself or in sub-folders, one per split or piece
of a split. The field `file_name` of a row names its picture, relative to the folder of the metadata.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minimind_v.core.errors import DataError
from minimind_v.core.hub.sources import METADATA
from minimind_v.core.rows.file_rows import Read, ShardedRows
from minimind_v.core.rows.jsonl import open_json
from minimind_v.core.rows.parquet import ParquetRows
from minimind_v.core.rows.parquet_pieces import source_of
from minimind_v.core.rows.row import OpenedRows, RowStore
from minimind_v.core.rows.splits import LEARN, of_one_split
from minimind_v.core.rows.subset import RowsOfStores
from minimind_v.core.rows.tables import CsvRows

DEPTH = 3  # levels of sub-folders that are searched for metadata
HEAD = 2**16  # bytes of metadata that are searched for a field of file names
OPENERS = {".jsonl": open_json, ".csv": CsvRows, ".parquet": ParquetRows}  # of a file of metadata
FILE_NAME = re.compile(rb"file[_ -]?name", re.IGNORECASE)


def find_metadata(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The metadata files of a folder or, where it has none, of the folders below it."""
    files = [file for name in METADATA if (file := folder / name).is_file() and _names_files(file)]
    yield from files
    if not files and depth:
        with os.scandir(folder) as entries:  # `is_dir` needs no system call, even for half a million pictures
            below = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        for name in below:
            yield from find_metadata(folder / name, depth - 1)


def _names_files(file: Path) -> bool:
    """Whether the rows of a file name files: beside shards, a file of another kind may be called metadata."""
    if file.suffix != ".parquet":
        with file.open("rb") as opened:
            return FILE_NAME.search(opened.read(HEAD)) is not None
    try:
        names = pq.read_schema(source_of(file)).names
    except (pa.ArrowException, OSError):
        return True  # opening it raises the error
    return any(name.endswith(("file_name", "file_names")) for name in names)


class FolderRows(RowsOfStores, ShardedRows):
    """The rows of one split, from the metadata files of a folder."""

    file_kind = "imagefolder"

    def __init__(
        self, path: Path, images: Path | None = None, split: str | None = None, order: Sequence[str] = LEARN
    ) -> None:
        """`images` holds the pictures if not beside the metadata. Raises DataError, MissingInput or UsageError."""
        self.path = path
        named = list(find_metadata(path))
        for file, other in pairwise(named):
            if file.parent == other.parent:
                raise DataError(f"{file.parent}: both {file.name} and {other.name} — give the path of one of them")
        files, self.choice = of_one_split(path, {file: file.parent.relative_to(path) for file in named}, split, order)
        self.files = files
        self._stores: list[OpenedRows] = [OPENERS[file.suffix](file, images or file.parent) for file in files]
        self.left_out = "; ".join(filter(None, (store.left_out for store in self._stores)))
        self._ends = np.cumsum([len(store) for store in self._stores])
        # Names relative to several folders are of no use in another file: treat these pictures as part of the rows.
        self._pictures = images or (files[0].parent if len(files) == 1 else None)

    @property
    def pictures(self) -> Path | None:
        return self._pictures

    @property
    def read(self) -> Read:
        return self._stores[0].read

    @read.setter
    def read(self, read: Read) -> None:
        for store in self._stores:
            store.read = read

    def _store(self, index: int) -> tuple[RowStore, int]:
        file, row = self._at(index)
        return self._stores[file], row

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        return self._stores[0].shuffled(rng) if len(self._stores) == 1 else super().shuffled(rng)
