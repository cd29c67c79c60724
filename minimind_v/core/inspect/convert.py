"""Rows from one form into another without loss: JSONL with a zip of pictures, or parquet with the pictures in it.

Rows are written in parts, each whole or absent, in a folder beside the target; a conversion that was stopped goes on
behind the last whole part. At the end the parts become the target, which has its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from minimind_v.core.data.parquet import source_of
from minimind_v.core.data.row import Row, RowStore
from minimind_v.core.errors import DataError, RowError, RunError, UsageError
from minimind_v.core.files import as_json, write_atomically, write_text

LOCK = "lock"  # in the folder of the parts
PART_ROWS, PART_BYTES = 1000, 2**26  # a part, and a row group of parquet, ends at either
NUMBERED = re.compile(r"picture \d+")  # what parquet calls a picture without a name
SCHEMA = pa.schema(
    [
        ("conversations", pa.string()),
        ("image_bytes", pa.list_(pa.binary())),
        ("image", pa.string()),  # the names, as JSONL has them
        ("extra", pa.string()),  # all other keys of the row, as JSON
    ]
)
ENDINGS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp", b"II*": "tif"}


@dataclass(frozen=True)
class Converted:
    """What was written."""

    files: list[Path]
    rows: int
    resumed_at: int  # rows that an earlier run had done


@dataclass(frozen=True)
class Whole:
    """A row with the bytes of its pictures."""

    row: Row
    pictures: list[bytes]


def convert(
    rows: RowStore, out: Path, overwrite: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
) -> Converted:
    """Write rows as `out`, in the form that its ending says.

    Raises UsageError for another ending or a target that exists, DataError for the first row that cannot be read:
    nothing is left out without being asked for.
    """
    target = check_target(out, overwrite)
    keep_source(rows, target.files)
    with _alone(target):
        done = begun = _resume(rows, target)
        for part in _parts(rows, done):
            target.write_part(done, part)
            done += len(part)
            progress(done, len(rows))
        target.finish()
        shutil.rmtree(target.folder)
    return Converted(target.files, done, begun)


def check_target(out: Path, overwrite: bool) -> Form:
    """The form that a file's name asks for. Raises UsageError for another ending, and for a file that is there."""
    form: type[Form] | None = {".jsonl": JsonlZip, ".parquet": Parquet}.get(out.suffix)  # type: ignore[assignment]
    if form is None:
        raise UsageError(f"{out}: ends in neither .jsonl nor .parquet, so it is not clear what to write")
    target = form(out, out.with_name(f".{out.name}.parts"))
    for path in target.files:
        if path.exists() and not overwrite:
            raise UsageError(f"{path} is there already — add --overwrite to replace it")
    return target


def keep_source(rows: RowStore, files: list[Path]) -> None:
    """Raises UsageError where the rows, or their pictures, would be written over while they are read."""
    sources = [path.resolve() for path in (rows.path, rows.pictures) if path]
    for file in files:
        if file.resolve() in sources:
            raise UsageError(f"{file} is what is read, so it cannot be written — name another file")


def read_whole(rows: RowStore, index: int) -> Whole:
    """A row with its pictures. Raises DataError that names it."""
    try:
        row = rows.row(index)
        return Whole(row, [rows.picture(index, position, name) for position, name in enumerate(row.images)])
    except RowError as error:
        raise unreadable(rows, index, error) from None


def unreadable(rows: RowStore, index: int, error: RowError) -> DataError:
    """The error over a row that must be read and cannot be."""
    return DataError(f"{rows.place(index)}: {error} — `mmv data check --fix` writes a copy without such rows")


@contextmanager
def _alone(target: Form) -> Iterator[None]:
    """No second run writes the same parts, or removes them. Raises RunError."""
    lock = FileLock(target.folder / LOCK)
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{target.files[0]}: another run is writing it — wait for that, or name another file") from None
    except OSError as error:
        raise RunError(f"{target.files[0]}: cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        if not any(target.folder.glob("part-*")):  # nothing to go on from
            shutil.rmtree(target.folder, ignore_errors=True)
        lock.release()


def _resume(rows: RowStore, target: Form) -> int:
    """Rows that stand in whole parts of an earlier run over the same source; parts of another source are removed."""
    plan = target.folder / "source.json"
    files = [path for path in (rows.path, rows.pictures) if path]
    files += sorted(rows.path.rglob("*")) if rows.path.is_dir() else []
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    chosen = hashlib.sha256()  # not the same of two selections
    for index in range(len(rows)):
        chosen.update(f"{rows.place(index)}\n".encode("utf-8", "surrogateescape"))
    told = json.dumps({"rows": chosen.hexdigest(), "files": stamps})
    if not plan.is_file() or plan.read_text(encoding="utf-8") != told:
        for path in target.folder.iterdir():
            if path.name != LOCK:
                path.unlink()
        write_text(plan, told)
    done = 0
    for begin, count in target.parts():
        if begin != done:
            break
        done += count
    return done


def _parts(rows: RowStore, begin: int) -> Iterator[list[Whole]]:
    part: list[Whole] = []
    size = 0
    for index in range(begin, len(rows)):
        whole = read_whole(rows, index)
        part.append(whole)
        size += sum(map(len, whole.pictures))
        if len(part) == PART_ROWS or size > PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


class Form(Protocol):
    """A form that rows are written in."""

    files: list[Path]  # what it comes to
    folder: Path  # of its parts

    def __init__(self, out: Path, folder: Path) -> None: ...

    def parts(self) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each whole part, in order."""

    def write_part(self, begin: int, part: list[Whole]) -> None:
        """Write some rows, the first of which is number `begin` from 0."""

    def finish(self) -> None:
        """Make the files of the parts."""


def _named(folder: Path, ending: str) -> list[Path]:
    return sorted(folder.glob(f"part-*.{ending}"))


class Parquet:
    """One file, a row group per part."""

    def __init__(self, out: Path, folder: Path) -> None:
        self.files, self.folder = [out], folder

    def parts(self) -> Iterator[tuple[int, int]]:
        for path in _named(self.folder, "parquet"):
            yield int(path.stem.split("-")[1]), pq.read_metadata(source_of(path)).num_rows

    def write_part(self, begin: int, part: list[Whole]) -> None:
        cells: list[list[Any]] = [[], [], [], []]
        for whole in part:
            row = whole.row
            named = row.images and not all(NUMBERED.fullmatch(name) for name in row.images)
            cells[0].append(as_json(row.conversations))
            cells[1].append(whole.pictures)
            cells[2].append(", ".join(name.replace(",", "_") for name in row.images) if named else None)
            cells[3].append(as_json(row.extra) if row.extra else None)
        table = pa.table(cells, schema=SCHEMA)
        path = self.folder / f"part-{begin:09d}.parquet"
        # Pictures are compressed already.
        write_atomically(path, lambda file: pq.write_table(table, file, compression=COMPRESSION))

    def finish(self) -> None:
        def write(file: Any) -> None:
            with pq.ParquetWriter(file, SCHEMA, compression=COMPRESSION) as writer:
                for path in _named(self.folder, "parquet"):
                    writer.write_table(pq.read_table(source_of(path)))

        write_atomically(self.files[0], write)


COMPRESSION = {"conversations": "zstd", "image_bytes.list.element": "none", "image": "zstd", "extra": "zstd"}


class JsonlZip:
    """A JSONL, and a zip of its pictures beside it under the name by which it is found."""

    def __init__(self, out: Path, folder: Path) -> None:
        name = out.name.removesuffix(".jsonl").removesuffix("_data")
        self.files, self.folder = [out, out.with_name(f"{name}_images.zip")], folder
        self._members: dict[str, tuple[int, int]] | None = None  # name → CRC and size

    def parts(self) -> Iterator[tuple[int, int]]:
        for path in _named(self.folder, "jsonl"):
            yield int(path.stem.split("-")[1]), path.read_bytes().count(b"\n")

    def write_part(self, begin: int, part: list[Whole]) -> None:
        if self._members is None:
            self._members = {}
            for path in _named(self.folder, "zip"):
                if path.with_suffix(".jsonl").exists() and int(path.stem.split("-")[1]) < begin:
                    self._members |= _directory(path)
        lines: list[str] = []
        archive_path = self.folder / f"part-{begin:09d}.zip"

        def write(file: Any) -> None:
            with zipfile.ZipFile(file, "w") as archive:
                for number, whole in enumerate(part, begin + 1):
                    names = [
                        self._store(archive, self._name(name, data, number, position), data)
                        for position, (name, data) in enumerate(zip(whole.row.images, whole.pictures, strict=True))
                    ]
                    image = {"image": ", ".join(names)} if names else {}
                    lines.append(as_json({"conversations": whole.row.conversations} | image | whole.row.extra))

        write_atomically(archive_path, write)  # before its rows, whose being there says that the part is whole
        write_text(archive_path.with_suffix(".jsonl"), "".join(f"{line}\n" for line in lines))

    def _name(self, name: str, data: bytes, row: int, position: int) -> str:
        """The picture's own name, as a member may be called and a list of names may hold it; else its row's number."""
        if NUMBERED.fullmatch(name):
            ending = next((ending for magic, ending in ENDINGS.items() if data.startswith(magic)), "bin")
            return f"{row:08d}_{position + 1}.{ending}" if position else f"{row:08d}.{ending}"
        parts = [part for part in name.replace("\\", "/").replace(",", "_").split("/") if part not in ("", ".", "..")]
        return "/".join(parts) or f"{row:08d}"

    def _store(self, archive: zipfile.ZipFile, name: str, data: bytes) -> str:
        """Put a picture in unless it is there; another one of the same name gets a new name. Returns the name."""
        assert self._members is not None
        stem, dot, ending = name.rpartition(".")
        known, copy = (zlib.crc32(data), len(data)), 1
        while self._members.get(name, known) != known:
            copy += 1
            name = f"{stem}~{copy}{dot}{ending}"
        if name not in self._members:
            archive.writestr(zipfile.ZipInfo(name), data)  # a fixed date: the same rows give the same bytes
            self._members[name] = known
        return name

    def finish(self) -> None:
        def write_pictures(file: Any) -> None:
            with zipfile.ZipFile(file, "w") as whole:
                for path in _named(self.folder, "zip"):
                    with zipfile.ZipFile(path) as part:
                        for member in part.infolist():
                            whole.writestr(zipfile.ZipInfo(member.filename), part.read(member))

        def write_rows(file: Any) -> None:
            for path in _named(self.folder, "jsonl"):
                file.write(path.read_bytes())

        write_atomically(self.files[1], write_pictures)
        write_atomically(self.files[0], write_rows)


def _directory(path: Path) -> dict[str, tuple[int, int]]:
    with zipfile.ZipFile(path) as archive:
        return {member.filename: (member.CRC, member.file_size) for member in archive.infolist()}
