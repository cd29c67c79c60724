"""Download the first rows of a data set, reading only the bytes that they need.

What is transferred: of a parquet file its footer and the pages of its first rows (not their whole row group); of a
JSONL its first lines; of a zip its directory, and the members that those lines name. A part cannot be proven by the sum
of the whole, but it is read at one commit, every answer must be of the listed size, and a page or a member that is
damaged does not decode.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from minimind_v.core.errors import DataError
from minimind_v.core.files import write_atomically
from minimind_v.core.hub.ranges import RangeFile
from minimind_v.core.hub.remote import Hub, HubError
from minimind_v.core.wording import plural

if TYPE_CHECKING:
    from minimind_v.core.hub.wanted import Item, Listener

GROUP = 64  # rows in a row group of the sample
TOGETHER = 1 << 22  # bytes of neighbouring zip members that are fetched by one request


def take_sample(hub: Hub, items: Sequence[Item], listener: Listener) -> int:
    """Write the first rows of one split. Returns the number of bytes transferred. Raises HubError, DataError."""
    files = {item.path.suffix: RangeFile(hub, item.url, item.remote.path, _size(item)) for item in items}
    paths = {item.path.suffix: item.path for item in items}
    rows = items[0].want.rows if items[0].want else 0
    assert rows
    try:
        if ".parquet" in files:
            count = _parquet(files[".parquet"], rows, paths[".parquet"])
        else:
            lines = _lines(files[".jsonl"], rows)
            _pictures(files[".zip"], lines, paths[".zip"], listener)
            write_atomically(paths[".jsonl"], lambda file: file.write(b"".join(lines)))
            count = len(lines)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"{items[0].remote.path} on {hub.endpoint} cannot be read ({error})") from None
    came, whole = sum(file.transferred for file in files.values()), sum(file.size for file in files.values())
    listener.say(
        f"{plural(count, 'row')} of {', '.join(file.name for file in files.values())}: "
        f"{came / 1e6:,.1f} of {whole / 1e6:,.1f} MB transferred"
    )
    if count < rows:
        listener.warn(f"the data set has only {count} rows; downloading all of them")
    return came


def _size(item: Item) -> int:
    if item.remote.size is None:
        raise HubError(f"the hub gives no size for {item.remote.path}, so no sample can be taken")
    return item.remote.size


def _parquet(source: RangeFile, rows: int, path: Any) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    try:
        # A buffer makes pyarrow read a column page by page; without one it takes the whole column of a row group.
        file = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 18)
        schema = file.schema_arrow

        def write(target: BinaryIO) -> None:
            nonlocal count
            with pq.ParquetWriter(target, schema) as writer:
                for batch in file.iter_batches(batch_size=min(rows, GROUP), use_threads=False):
                    group = batch.slice(0, rows - count)
                    writer.write_table(pa.Table.from_batches([group], schema))
                    count += len(group)
                    if count == rows:
                        break

        write_atomically(path, write)
    except pa.ArrowInvalid as error:
        raise DataError(f"{source.name} on {source.hub.endpoint} is not a parquet file ({error})") from None
    return count


def _lines(source: RangeFile, rows: int) -> list[bytes]:
    import io

    lines: list[bytes] = []
    reader = io.BufferedReader(source)
    while len(lines) < rows and (line := reader.readline()):
        if line.strip():
            lines.append(line if line.endswith(b"\n") else line + b"\n")
    if lines and lines[0].lstrip()[:1] not in (b"{", b"["):
        raise DataError(f"{source.name} on {source.hub.endpoint} is not JSON lines")
    return lines


def _pictures(source: RangeFile, lines: Sequence[bytes], path: Any, listener: Listener) -> None:
    with zipfile.ZipFile(source) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        stops = [member.header_offset for member in members[1:]] + [archive.start_dir]
        row_names = set(_names(lines))
        bare = {PurePosixPath(name).name for name in row_names}
        chosen = [
            (member, stop)
            for member, stop in zip(members, stops, strict=True)
            if not member.is_dir() and (member.filename in row_names or PurePosixPath(member.filename).name in bare)
        ]
        names = {PurePosixPath(member.filename).name for member, _ in chosen}
        if lacking := len(bare - names):
            listener.warn(f"{source.name} lacks {lacking} images of these rows")

        def write(target: BinaryIO) -> None:
            with zipfile.ZipFile(target, "w") as copy:
                for index, (member, stop) in enumerate(chosen):
                    source.hold(member.header_offset, _run(chosen, index, stop))
                    copy.writestr(zipfile.ZipInfo(member.filename, member.date_time), archive.read(member))

        write_atomically(path, write)


def _run(chosen: Sequence[tuple[zipfile.ZipInfo, int]], index: int, stop: int) -> int:
    """The end of the group of neighbours that one request fetches together with member `index`."""
    start = chosen[index][0].header_offset
    for member, after in chosen[index + 1 :]:
        if member.header_offset != stop or after - start > TOGETHER:
            break
        stop = after
    return stop


def _names(lines: Sequence[bytes]) -> list[str]:
    """The picture files that rows name: comma-separated, or a list. What is not JSON is left to the readers."""
    names: list[str] = []
    for line in lines:
        try:
            image = json.loads(line).get("image") or ""
        except (ValueError, AttributeError):
            continue
        listed = image if isinstance(image, list) else str(image).split(",")
        names += [name.strip() for name in listed if isinstance(name, str) and name.strip()]
    return names
