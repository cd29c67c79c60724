"""Split rows by image: no image is on both sides, even under another file name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minimind_v.core.curate.convert import check_files, convert, unreadable
from minimind_v.core.errors import RowError, RunError, UsageError
from minimind_v.core.files import only_writer, write_atomically
from minimind_v.core.outputs import check_folder
from minimind_v.core.rows.arrow import SavedRows
from minimind_v.core.rows.cells import data_uri
from minimind_v.core.rows.folder import FolderRows
from minimind_v.core.rows.heldout import choose, group_by_picture
from minimind_v.core.rows.parquet import ParquetRows
from minimind_v.core.rows.row import RowStore
from minimind_v.core.rows.subset import SampledRows
from minimind_v.core.rows.tar import TarRows
from minimind_v.core.rows.writers import ENDINGS, json_line
from minimind_v.core.wording import plural

SPLIT = "split"  # the name of the lock and of temporary files


@dataclass(frozen=True)
class Split:
    """The two files of rows."""

    train: Path
    held_out: Path
    train_rows: int
    held_out_rows: int
    groups: int  # sets of rows that share no picture with other rows


def split(
    rows: RowStore,
    out: Path,
    held_out: float,
    seed: int,
    overwrite: bool = False,
    begin: Callable[[str], Callable[[int, int], None]] = lambda stage: lambda done, total: None,
) -> Split:
    """Write `train` and `held_out` into a folder: parquet if the rows contain their pictures, else JSONL.

    `held_out` is a share below 1, or a number of rows from 1 on. Rows that share a picture, directly or through other
    rows, stay together. `begin` gets the name of a stage, and returns what gets its progress.
    Raises UsageError if one side would be empty, DataError for an unreadable row.
    """
    packed = isinstance(rows, ParquetRows | SavedRows | TarRows) or (
        isinstance(rows, FolderRows) and rows.pictures is None
    )  # with the pictures in the rows
    train, aside = (out / f"{name}.{'parquet' if packed else 'jsonl'}" for name in ("train", "held_out"))
    check_folder(out)
    check_files([train, aside], overwrite, rows.path, rows.pictures)
    for path in (train, aside):
        if path.is_dir():
            raise UsageError(f"{path} is a folder — name another --out")

    def refuse(index: int, error: RowError) -> None:
        raise unreadable(rows, index, error)

    reading = begin("reading rows")
    groups = group_by_picture(rows, refuse, lambda done: reading(done, len(rows)))
    held = _hold_out(groups, held_out, seed)
    with only_writer(out / SPLIT):
        check_files([train, aside], overwrite, rows.path, rows.pictures)  # another run may have made them
        staging = out / f".{SPLIT}.parts"  # both files get their names, or neither
        staged = [staging / path.name for path in (aside, train)]
        try:
            writing, written = begin("writing rows"), 0
            for path, chosen in zip(staged, (held, ~held), strict=True):
                chosen_rows = SampledRows(rows, np.flatnonzero(chosen))

                def count(done: int, _: int, before: int = written) -> None:
                    writing(before + done, len(rows))

                if packed:
                    convert(chosen_rows, path, True, count)
                else:
                    _write_rows(chosen_rows, path)
                    count(len(chosen_rows), 0)
                written += len(chosen_rows)
            _publish(staged, [aside, train])
        finally:
            for path in staged:
                path.unlink(missing_ok=True)
            with suppress(OSError):  # it contains parts of an interrupted conversion
                staging.rmdir()
    return Split(train, aside, int((~held).sum()), int(held.sum()), len(np.unique(groups)))


def _publish(staged: list[Path], final: list[Path]) -> None:
    """Rename all files, or none: restores the old files and raises RunError if one cannot be renamed."""
    aside = {path: staged[0].with_name(f"{path.name}.old") for path in final}
    try:
        for new, path in zip(staged, final, strict=True):
            if path.exists():
                path.replace(aside[path])
            new.replace(path)
    except OSError as error:
        for path, old in aside.items():
            if old.exists():
                old.replace(path)
            elif not staged[final.index(path)].exists():
                path.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror or error}); the old file is unchanged") from None
    for old in aside.values():
        old.unlink(missing_ok=True)


def _hold_out(groups: np.ndarray, held_out: float, seed: int) -> np.ndarray:
    """Held-out rows, bool [rows]: whole groups in the seed's order, up to the number of rows."""
    count = round(held_out * len(groups)) if held_out < 1 else int(held_out)
    held = choose(groups, count, seed)
    if not 0 < held.sum() < len(groups):
        raise UsageError(
            f"--held-out {held_out:g} of {plural(len(groups), 'row')}, in {plural(len(np.unique(groups)), 'group')} "
            "that share images, leaves one side empty — choose another share"
        )
    return held


def _write_rows(rows: RowStore, path: Path) -> None:
    """Write rows as JSONL, with their pictures' names, or in base64 those that the rows contain."""

    def write(file: BinaryIO) -> None:
        for index in range(len(rows)):
            row = rows.row(index)
            names = [
                _inline(rows.picture(index, position, name)) if position in row.inline else name
                for position, name in enumerate(row.images)
            ]
            file.write(json_line(row, names).encode())

    write_atomically(path, write)


def _inline(data: bytes) -> str:
    return data_uri(data, next((ending for magic, ending in ENDINGS.items() if data.startswith(magic)), "unknown"))
