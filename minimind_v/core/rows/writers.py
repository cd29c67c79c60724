"""Write rows as JSONL with a zip of image files, or as parquet with the picture bytes.

Each form writes chunks to a folder, whole or absent, and joins them into its files at the end.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from minimind_v.core.files import as_json, write_atomically, write_text
from minimind_v.core.rows.names import PicturePath
from minimind_v.core.rows.parquet_pieces import source_of
from minimind_v.core.rows.row import NUMBERED, Row, names_as_text

LONGEST = 2**15  # bytes of a member's name; a zip allows twice as many
SCHEMA = pa.schema(
    [
        ("conversations", pa.string()),
        ("image_bytes", pa.list_(pa.binary())),
        ("image", pa.string()),  # the names as JSONL has them; a list as JSON text
        ("extra", pa.string()),  # all other keys of the row, as JSON
    ]
)
ENDINGS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp", b"II*": "tif"}
# Picture files are compressed already.
COMPRESSION = {"conversations": "zstd", "image_bytes.list.element": "none", "image": "zstd", "extra": "zstd"}


@dataclass(frozen=True)
class Whole:
    """A row with the bytes of its pictures."""

    row: Row
    pictures: list[bytes]


class RowFormat(Protocol):
    """A file format that rows are written in."""

    files: list[Path]  # the output
    folder: Path  # of its chunks

    def __init__(self, out: Path, folder: Path) -> None: ...

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each whole chunk, in order."""

    def write_chunk(self, begin: int, chunk: list[Whole]) -> None:
        """Write some rows; the first has number `begin`, from 0."""

    def finish(self) -> None:
        """Join the chunks into the files."""


def _named(folder: Path, ending: str) -> list[Path]:
    return sorted(folder.glob(f"part-*.{ending}"))


class Parquet:
    """One file, a row group per chunk."""

    def __init__(self, out: Path, folder: Path) -> None:
        self.files, self.folder = [out], folder

    def chunks(self) -> Iterator[tuple[int, int]]:
        for path in _named(self.folder, "parquet"):
            yield int(path.stem.split("-")[1]), pq.read_metadata(source_of(path)).num_rows

    def write_chunk(self, begin: int, chunk: list[Whole]) -> None:
        cells: list[list[Any]] = [[], [], [], []]
        for whole in chunk:
            row = whole.row
            named = not all(NUMBERED.fullmatch(name) for name in row.images)
            names = names_as_text(row.images) if named else None
            cells[0].append(as_json(row.conversations))
            cells[1].append(whole.pictures)
            cells[2].append(as_json(names) if isinstance(names, list) else names)
            cells[3].append(as_json(row.extra) if row.extra else None)
        table = pa.table(cells, schema=SCHEMA)
        path = self.folder / f"part-{begin:09d}.parquet"
        write_atomically(path, lambda file: pq.write_table(table, file, compression=COMPRESSION))

    def finish(self) -> None:
        def write(file: Any) -> None:
            with pq.ParquetWriter(file, SCHEMA, compression=COMPRESSION) as writer:
                for path in _named(self.folder, "parquet"):
                    writer.write_table(pq.read_table(source_of(path)))

        write_atomically(self.files[0], write)


def json_line(row: Row, names: list[str]) -> str:
    """A row as a line of JSONL, with these names of its pictures."""
    image = {"image": names_as_text(names)} if names else {}
    return as_json({"conversations": row.conversations} | image | row.extra) + "\n"


class JsonlZip:
    """A JSONL, and a zip of its pictures beside it under the name by which it is found."""

    def __init__(self, out: Path, folder: Path) -> None:
        name = out.name.removesuffix(".jsonl").removesuffix("_data")
        self.files, self.folder = [out, out.with_name(f"{name}_images.zip")], folder
        self._members: dict[str, tuple[int, int]] | None = None  # name → CRC and size

    def chunks(self) -> Iterator[tuple[int, int]]:
        for path in _named(self.folder, "jsonl"):
            yield int(path.stem.split("-")[1]), path.read_bytes().count(b"\n")

    def write_chunk(self, begin: int, chunk: list[Whole]) -> None:
        if self._members is None:
            self._members = {}
            for path in _named(self.folder, "zip"):
                if path.with_suffix(".jsonl").exists() and int(path.stem.split("-")[1]) < begin:
                    self._members |= _directory(path)
        lines: list[str] = []
        archive_path = self.folder / f"part-{begin:09d}.zip"

        def write(file: Any) -> None:
            with zipfile.ZipFile(file, "w") as archive:
                for number, whole in enumerate(chunk, begin + 1):
                    names = [
                        self._store(archive, name, data, f"{number:08d}" + f"_{position}" * (position > 1))
                        for position, (name, data) in enumerate(zip(whole.row.images, whole.pictures, strict=True), 1)
                    ]
                    lines.append(json_line(whole.row, names))

        write_atomically(archive_path, write)  # before its rows, which mark the chunk as whole
        write_text(archive_path.with_suffix(".jsonl"), "".join(lines))

    def _store(self, archive: zipfile.ZipFile, name: str, data: bytes, number: str) -> str:
        """Store a picture unless the archive has it, and return its name for the row: if possible its own.

        A picture without a usable name gets its row's number as a name; a second picture of one name gets a new name.
        """
        assert self._members is not None
        member = own = "/".join(folder for folder in PicturePath.of(name).names if folder != "..")
        if NUMBERED.fullmatch(name) or not 0 < len(own.encode()) <= LONGEST:
            ending = next((ending for magic, ending in ENDINGS.items() if data.startswith(magic)), "bin")
            member = f"{number}.{ending}"
        stem, dot, ending = member.rpartition(".")
        content, copy = (zlib.crc32(data), len(data)), 1
        while self._members.get(member, content) != content:
            copy += 1
            member = f"{stem}~{copy}{dot}{ending}"
        if member not in self._members:
            archive.writestr(zipfile.ZipInfo(member), data)  # a fixed date: the same rows give the same bytes
            self._members[member] = content
        return name if member == own and ".." not in PicturePath.of(name).names else member

    def finish(self) -> None:
        def write_pictures(file: Any) -> None:
            with zipfile.ZipFile(file, "w") as whole:
                for path in _named(self.folder, "zip"):
                    with zipfile.ZipFile(path) as chunk:
                        for member in chunk.infolist():
                            whole.writestr(zipfile.ZipInfo(member.filename), chunk.read(member))

        def write_rows(file: Any) -> None:
            for path in _named(self.folder, "jsonl"):
                file.write(path.read_bytes())

        write_atomically(self.files[1], write_pictures)
        write_atomically(self.files[0], write_rows)


def _directory(path: Path) -> dict[str, tuple[int, int]]:
    with zipfile.ZipFile(path) as archive:
        return {member.filename: (member.CRC, member.file_size) for member in archive.infolist()}
