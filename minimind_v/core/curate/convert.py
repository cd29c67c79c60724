"""Convert rows without loss: to JSONL with a zip of image files, or to parquet with the image bytes.

Rows are written in parts, each whole or absent, in a folder beside the target; an interrupted conversion resumes after
the last whole part. At the end the parts become the target, which gets its name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minimind_v.core.errors import DataError, RowError, UsageError
from minimind_v.core.files import only_writer, write_text
from minimind_v.core.outputs import keep_inputs, keep_set
from minimind_v.core.rows.forms import check_form
from minimind_v.core.rows.row import RowStore
from minimind_v.core.rows.writers import JsonlZip, Parquet, RowFormat, Whole

FINISHING = "finishing"  # a file in the folder of the parts while the target is being made
PART_ROWS, PART_BYTES = 1000, 2**26  # a part, and a row group of parquet, ends at either


@dataclass(frozen=True)
class Converted:
    """The files that a conversion wrote."""

    files: list[Path]
    rows: int
    resumed_at: int  # rows of an earlier run


def convert(
    rows: RowStore, out: Path, overwrite: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
) -> Converted:
    """Write rows as `out`, in the format of its ending.

    Raises UsageError for another ending or an existing target, DataError for the first unreadable row: no row is left
    out silently.
    """
    find_target(out, overwrite, rows.path, rows.pictures)
    with only_writer(out):
        target = find_target(out, overwrite, rows.path, rows.pictures)  # another run may have written it meanwhile
        try:
            return _convert(rows, target, progress)
        finally:
            if not any(target.folder.glob("part-*")):  # nothing to resume from
                shutil.rmtree(target.folder, ignore_errors=True)


def _convert(rows: RowStore, target: RowFormat, progress: Callable[[int, int], None]) -> Converted:
    """Write the missing parts, and make the target from all parts."""
    done = begun = _resume(rows, target)
    for batch in _batches(rows, done):
        target.write_chunk(done, batch)
        done += len(batch)
        progress(done, len(rows))
    write_text(target.folder / FINISHING, "")
    target.finish()
    shutil.rmtree(target.folder)
    return Converted(target.files, done, begun)


def find_target(out: Path, overwrite: bool, rows: Path, pictures: Path | None, *others: Path | None) -> RowFormat:
    """The format of a file that may be written.

    Raises UsageError for another ending, for an existing file, and if it would overwrite one of the other paths.
    """
    form: type[RowFormat] | None = {".jsonl": JsonlZip, ".parquet": Parquet}.get(out.suffix)  # type: ignore[assignment]
    if form is None:
        raise UsageError(f"{out}: must end in .jsonl or .parquet")
    if out.is_dir():
        raise UsageError(f"{out} is a folder — name a file")
    target = form(out, out.with_name(f".{out.name}.parts"))
    check_files(target.files, overwrite or _only_ours(target), rows, pictures, *others)
    return target


def _only_ours(target: RowFormat) -> bool:
    """Whether all existing files are of a conversion that was interrupted before it renamed the last one."""
    try:
        begun = (target.folder / FINISHING).stat().st_mtime_ns
        return all(path.stat().st_mtime_ns >= begun for path in target.files if path.exists())
    except OSError:
        return False


def check_files(files: list[Path], overwrite: bool, rows: Path, *others: Path | None) -> None:
    """Raises UsageError as `find_target`, if files of rows may not be written."""
    keep_inputs(files, (rows, *others))
    keep_set(files, rows)
    for path in files:
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists — add --overwrite to replace it")


def read_whole(rows: RowStore, index: int) -> Whole:
    """A row with its pictures. Raises DataError with its file:row."""
    try:
        row = check_form(rows.row(index))
        return Whole(row, [rows.picture(index, position, name) for position, name in enumerate(row.images)])
    except RowError as error:
        raise unreadable(rows, index, error) from None


def unreadable(rows: RowStore, index: int, error: RowError) -> DataError:
    """The error for an unreadable row that may not be skipped, with the next step."""
    advice = "" if " — " in str(error) else " — write a copy without such rows with `mmv data check --fix`"
    return DataError(f"{rows.location(index)}: {error}{advice}")


def _resume(rows: RowStore, target: RowFormat) -> int:
    """Rows in whole parts of an earlier run over the same source; removes parts of another source."""
    plan = target.folder / "source.json"
    files = [path for path in (rows.path, rows.pictures) if path]
    files += sorted(rows.path.rglob("*")) if rows.path.is_dir() else []
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    chosen = hashlib.sha256()  # differs between selections of rows
    for index in range(len(rows)):
        chosen.update(f"{rows.location(index)}\n".encode("utf-8", "surrogateescape"))
    description = json.dumps({"rows": chosen.hexdigest(), "files": stamps})
    if not plan.is_file() or plan.read_text(encoding="utf-8") != description:
        shutil.rmtree(target.folder, ignore_errors=True)
        write_text(plan, description)
    done = 0
    for begin, count in target.chunks():
        if begin != done:
            break
        done += count
    return done


def _batches(rows: RowStore, begin: int) -> Iterator[list[Whole]]:
    batch: list[Whole] = []
    size = 0
    for index in range(begin, len(rows)):
        whole = read_whole(rows, index)
        batch.append(whole)
        size += sum(map(len, whole.pictures))
        if len(batch) == PART_ROWS or size > PART_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
