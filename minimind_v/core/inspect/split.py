"""Holds out rows by picture: no picture stands on both sides, whatever it is called there."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minimind_v.core.data.parquet import ParquetRows
from minimind_v.core.data.row import RowStore
from minimind_v.core.errors import UsageError
from minimind_v.core.files import write_atomically
from minimind_v.core.inspect.check import picture_digest, text_digest
from minimind_v.core.inspect.convert import as_json, convert, read_whole
from minimind_v.core.inspect.sample import SampledRows


@dataclass(frozen=True)
class Split:
    """Two sets of rows."""

    train: Path
    held_out: Path
    train_rows: int
    held_out_rows: int
    groups: int  # rows that share no picture with rows of another


def split(
    rows: RowStore,
    out: Path,
    held_out: float,
    seed: int,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Split:
    """Write `train` and `held_out` into a folder: parquet where the rows have their pictures in them, else JSONL.

    `held_out` is a share below 1, or a number of rows from 1 on. Rows that share a picture, directly or by way of other
    rows, stay together. Raises UsageError where one side would be empty, DataError for a row that cannot be read.
    """
    wanted = round(held_out * len(rows)) if held_out < 1 else int(held_out)
    groups = _groups(rows, progress)
    order = sorted(groups, key=lambda group: group[0])
    random.Random(seed).shuffle(order)
    kept: list[int] = []
    for group in order:
        if len(kept) + len(group) <= wanted:
            kept += group
    if not 0 < len(kept) < len(rows):
        raise UsageError(
            f"--held-out {held_out:g} of {len(rows)} rows, in {len(groups)} groups that share pictures, "
            "leaves one side empty"
        )
    chosen = set(kept)
    ending = "parquet" if isinstance(rows, ParquetRows) else "jsonl"
    sides = {
        out / f"train.{ending}": [index for index in range(len(rows)) if index not in chosen],
        out / f"held_out.{ending}": sorted(chosen),
    }
    for path in sides:
        if path.exists() and not overwrite:
            raise UsageError(f"{path} is there already — add --overwrite to replace it")
    for path, indices in sides.items():
        part = SampledRows(rows, np.array(indices, np.int64))
        if ending == "parquet":
            convert(part, path, overwrite)
        else:
            _write_rows(part, path)
    train, held = sides
    return Split(train, held, len(sides[train]), len(sides[held]), len(groups))


def _groups(rows: RowStore, progress: Callable[[int, int], None]) -> list[list[int]]:
    """Indices of rows that belong together, by what their pictures are or, without any, by what they say."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    first: dict[bytes, int] = {}
    for index in range(len(rows)):
        whole = read_whole(rows, index)
        for digest in [picture_digest(data) for data in whole.pictures] or [text_digest(whole.row)]:
            one, other = sorted((root(first.setdefault(digest, index)), root(index)))
            parent[other] = one
        if index % 100 == 99:
            progress(index + 1, len(rows))
    found: dict[int, list[int]] = {}
    for index in range(len(rows)):
        found.setdefault(root(index), []).append(index)
    return list(found.values())


def _write_rows(rows: RowStore, path: Path) -> None:
    """Rows that name the same pictures as before."""

    def write(file: BinaryIO) -> None:
        for index in range(len(rows)):
            row = rows.row(index)
            image = {"image": ", ".join(row.images)} if row.images else {}
            file.write((as_json({"conversations": row.conversations} | image | row.extra) + "\n").encode())

    write_atomically(path, write)
