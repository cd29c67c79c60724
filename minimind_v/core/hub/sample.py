"""Download the first rows of a data set, reading only the bytes that they need.

It transfers: of a parquet file the footer and the pages of its first rows (not their whole row group); of a JSONL its
first lines; of a zip its directory and the members that those lines name. The digest of a whole file does not prove a
part of it. But all parts come from one commit, every answer must state the listed size, and a damaged page or member
does not decode.
"""

from __future__ import annotations

import io
import json
import re
import time
import zipfile
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from minimind_v.core.errors import DataError
from minimind_v.core.files import write_atomically
from minimind_v.core.hub.remote import RETRIED, TRIES, Hub, HubError, Unreachable, http, pause, reason_of, refused
from minimind_v.core.hub.wanted import Item, Listener
from minimind_v.core.wording import plural

GROUP = 64  # rows in a row group of the sample
AHEAD = 1 << 18  # bytes of a request, at least
TOGETHER = 1 << 22  # bytes of neighbouring zip members that are fetched by one request


def take_sample(hub: Hub, items: Sequence[Item], listener: Listener) -> int:
    """Write the first rows of one split. Returns the number of bytes transferred. Raises HubError, DataError."""
    files = {item.path.suffix: RangeFile(hub, item.url, item.remote.path, _size(item)) for item in items}
    paths = {item.path.suffix: item.path for item in items}
    rows = items[0].want.rows
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
        listener.warn(f"the data set has only {plural(count, 'row')}; downloading all of them")
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
            listener.warn(f"{source.name} lacks {plural(lacking, 'image')} of these rows")

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


class RangeFile(io.RawIOBase):
    """The bytes of `url`, fetched when they are read; the last piece is kept. `transferred` counts the bytes.

    Raises HubError if the server has no ranges, reports another size than the listing, or stops answering.
    """

    def __init__(self, hub: Hub, url: str, name: str, size: int) -> None:
        self.hub, self.url, self.name, self.size = hub, url, name, size
        self.transferred = 0
        self._at = 0
        self._piece, self._piece_at = b"", 0
        self._direct: str | None = None  # the address after redirects, used until it refuses (signatures expire)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self.size)
        count = max(stop - self._at, 0)
        if count:
            self.hold(self._at, stop)
            buffer[:count] = self._piece[self._at - self._piece_at : stop - self._piece_at]
            self._at = stop
        return count

    def hold(self, start: int, stop: int) -> None:
        """Fetch the bytes from `start` to `stop`."""
        have = self._piece_at + len(self._piece)
        if start < self._piece_at or start > have:
            self._piece, self._piece_at, have = b"", start, start
        if stop > have:
            until = min(max(stop, have + AHEAD), self.size)
            self._piece = self._piece[start - self._piece_at :] + self._get(have, until)
            self._piece_at = start

    def _get(self, start: int, stop: int) -> bytes:
        trouble = ""
        for attempt in range(TRIES):
            wait = pause(attempt)
            try:
                answer = self._ask(start, stop)
            except (http().HTTPError, ConnectionError, TimeoutError) as error:
                trouble = reason_of(error)
            else:
                if answer.status_code == 206:
                    return self._checked(answer, start, stop)
                if answer.status_code in (401, 403) and self._direct:
                    self._direct, wait = None, 0
                elif answer.status_code in RETRIED:
                    wait, trouble = pause(attempt, answer.headers), f"HTTP {answer.status_code}"
                    if wait is None or attempt == TRIES - 1:
                        raise refused(answer.status_code, self.hub, self.name)
                elif answer.status_code == 200:
                    raise HubError(
                        f"{self.hub.endpoint} delivers {self.name} only as a whole, so a sample is not possible — "
                        "leave out --sample, or use another --endpoint"
                    )
                else:
                    raise refused(answer.status_code, self.hub, self.name)
            time.sleep(wait or 0)
        raise Unreachable(
            f"{self.name} from {self.hub.endpoint}: {trouble}, {TRIES} times — run the same command again"
        )

    def _ask(self, start: int, stop: int) -> Any:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        url = self._direct or self.url
        headers = self.hub.headers() | {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
        if urlsplit(url).netloc != urlsplit(self.url).netloc:
            headers.pop("Authorization", None)
            headers.pop("authorization", None)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
            if answer.status_code == 206:
                answer.read()  # another status may stand before a body of gigabytes
                self.transferred += len(answer.content)
                self._direct = str(answer.url)
            return answer

    def _checked(self, answer: Any, start: int, stop: int) -> bytes:
        given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
        data: bytes = answer.content
        if not given or int(given[1]) != start or given[3] not in ("*", str(self.size)) or len(data) != stop - start:
            raise HubError(f"{self.name} from {self.hub.endpoint}: the answer has other bytes than requested")
        return data
