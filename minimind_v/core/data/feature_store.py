"""Image features on disk, indexed by a digest of the image; several processes may write at once.

A folder holds segments. A segment belongs to the process that made it and is two files: `.features`, records of one
size, and `.index`, an entry for each record, written after the record. Checksums prove an entry and its record, so that
readers ignore the remains of a kill, a crash of the machine or a damaged disk. No other process continues a segment.
Readers read new entries when they miss a key.

`pread` reads records, not a memory map: both use the page cache, and a file that is truncated while it is mapped ends
the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from minimind_v.core.data.feature_layout import FeatureLayout

ENTRY = 24  # bytes: a key of 16, the checksum of its record, the checksum of both
HEAD = 20  # bytes of an entry that its checksum covers
LOOSE = 4096  # entries in a dict before they are merged into the sorted arrays
SHARE = 4  # the stores take a quarter of the free bytes
PROBES = 4  # records that measure a disk
FULL = 32  # records that must stay free on a disk


def digest(data: bytes) -> bytes:
    """The key of a picture file: a digest of 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


class FeatureStore:
    """Features by key, for several threads. Cheap to pickle; each process, forked or spawned, opens its own files."""

    def __init__(self, folder: Path, layout: FeatureLayout, budget: int) -> None:
        """`budget` limits the bytes of all segments in this folder and the folders beside it."""
        self.folder, self.layout, self.budget = folder, layout, budget
        self._begin_process()

    @classmethod
    def below(cls, root: Path, name: str, layout: FeatureLayout) -> FeatureStore:
        """The store of this name in a folder of stores, which together may take a quarter of the free bytes."""
        return cls(root / name, layout, sum(used_and_free(root / name)) // SHARE)

    def _forget(self) -> None:
        self._segments: list[_Segment] = []
        self._names: set[str] = set()
        self._sorted = np.empty(0, np.uint64), np.empty(0, np.int64)  # beginnings of keys, and their entries
        self._loose: dict[int, int] = {}
        self._own: _Segment | None = None
        self.trouble: str | None = None  # why the store writes no more

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin_process()

    def _begin_process(self) -> None:
        self._pid, self._lock = os.getpid(), threading.RLock()
        self._forget()

    def _locked(self) -> threading.RLock:
        """The lock of this process. A fork gets its own: a thread of its parent may have held the lock of both."""
        if self._pid != os.getpid():
            self._begin_process()
        return self._lock

    def count(self) -> int:
        """Images with stored features."""
        with self._locked():
            self._refresh()
            return len(self._sorted[0]) + len(self._loose)

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, key: bytes) -> Tensor | None:
        """The features of an image [P, width]; None if they are missing or damaged."""
        with self._locked():
            entry = self._find(key)
            if entry is None and self._refresh():
                entry = self._find(key)
            if entry is None:
                return None
            segment, number = self._segments[entry >> 40], entry & (1 << 40) - 1
            data = segment.read(key, number)
            if data is None:  # forget the entry
                self._loose[_short(key)] = -1
                return None
        return self.layout.unpack(data)

    def _find(self, key: bytes) -> int | None:
        """Segment and number, as one integer, of an entry that begins like the key."""
        short = _short(key)
        entry = self._loose.get(short)
        if entry is None:
            keys, entries = self._sorted
            at = int(np.searchsorted(keys, np.uint64(short), "right")) - 1
            entry = int(entries[at]) if at >= 0 and int(keys[at]) == short else -1
        return entry if entry >= 0 else None

    def _refresh(self) -> bool:
        """Read new entries; returns whether there were any. Costs some microseconds."""
        names: set[str] = set()
        with contextlib.suppress(OSError):
            names = {entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".index")}
        for name in sorted(names - self._names):  # oldest first
            self._names.add(name)
            with contextlib.suppress(OSError):  # half deleted, or unreadable
                self._segments.append(_Segment(self.folder / name[: -len(".index")], self.layout.record))
        grown = False
        for number, segment in enumerate(self._segments):
            shorts, numbers = segment.grown()
            if len(shorts):
                grown = True
                self._take_in(shorts, numbers | number << 40)
        return grown

    def _take_in(self, shorts: np.ndarray, entries: np.ndarray) -> None:
        if len(self._loose) + len(shorts) <= LOOSE:
            self._loose |= zip(shorts.tolist(), entries.tolist(), strict=True)
            return
        loose = list(self._loose), list(self._loose.values())
        keys = np.concatenate([self._sorted[0], np.array(loose[0], np.uint64), shorts])
        where = np.concatenate([self._sorted[1], np.array(loose[1], np.int64), entries])
        order = np.argsort(keys, kind="stable")
        keys, where = keys[order], where[order]
        last = np.append(keys[1:] != keys[:-1], True)  # of entries with one key, the youngest
        self._sorted, self._loose = (keys[last], where[last]), {}

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, keys: Sequence[bytes], features: Tensor) -> None:
        """Add the features of images, [K, P, width] on the CPU, while there is room; stored ones stay.

        Without room or rights it sets `trouble` and does not raise.
        """
        with self._locked():
            self._write(keys, features)

    def _write(self, keys: Sequence[bytes], features: Tensor) -> None:
        fresh = {key: n for n, key in enumerate(keys) if self._find(key) is None}
        if self.trouble or not fresh:
            return
        try:
            if self._own is not None and self._own.deleted():
                self.close()
            self.trouble = self._no_room(len(fresh) * self.layout.record)
            if self.trouble:
                return
            if self._own is None:
                self._begin()
            assert self._own is not None
            records = self.layout.pack(features[list(fresh.values())])
            shorts, numbers = self._own.append(list(fresh), records)
        except OSError as error:
            self.trouble = f"{self.folder}: {error.strerror or error}"
            return
        self._take_in(shorts, numbers | self._segments.index(self._own) << 40)

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        self._own = _Segment(self.folder / name, self.layout.record, new=True)
        self._segments.append(self._own)
        self._names.add(f"{name}.index")

    def _no_room(self, needed: int) -> str | None:
        used, free = used_and_free(self.folder)
        if used + needed > self.budget:
            return f"the budget of {self.budget / 1e9:.1f} GB is used up"
        if free < needed + FULL * self.layout.record:
            return "the disk is full"
        return None

    def close(self) -> None:
        """Close all files. The next use opens them again."""
        with self._locked():
            for segment in self._segments:
                segment.close()
            self._forget()


class _Segment:
    """Two files that one process writes and any process reads."""

    def __init__(self, path: Path, record: int, new: bool = False) -> None:
        self.record = record
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL if new else os.O_RDONLY
        self._data = os.open(path.with_suffix(".features"), flags, 0o666)
        try:
            self._index = os.open(path.with_suffix(".index"), flags, 0o666)
        except OSError:
            os.close(self._data)
            raise
        self._entries = 0  # read or written

    def grown(self) -> tuple[np.ndarray, np.ndarray]:
        """Beginnings of keys and numbers of new entries with a correct checksum."""
        data = b""
        with contextlib.suppress(OSError):
            behind = os.fstat(self._index).st_size // ENTRY - self._entries
            data = os.pread(self._index, behind * ENTRY, self._entries * ENTRY) if behind > 0 else b""
        if not data:  # the usual case
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        return self._keep(data[: len(data) // ENTRY * ENTRY])

    def _keep(self, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
        table = np.frombuffer(raw, "<u8").reshape(-1, ENTRY // 8)  # column 0: beginnings of keys
        whole = [
            zlib.crc32(raw[at : at + HEAD]) == int.from_bytes(raw[at + HEAD : at + ENTRY], "little")
            for at in range(0, len(raw), ENTRY)
        ]
        numbers = np.flatnonzero(whole) + self._entries
        self._entries += len(table)
        return table[whole, 0], numbers

    def deleted(self) -> bool:
        """Whether its files were deleted: no reader would find new records."""
        return not os.fstat(self._data).st_nlink or not os.fstat(self._index).st_nlink

    def read(self, key: bytes, number: int) -> bytearray | None:
        """The record of an entry, if the entry has this key and the record is whole."""
        data = bytearray(self.record)
        try:
            entry = os.pread(self._index, HEAD, number * ENTRY)
            if entry[:16] != key or os.preadv(self._data, [data], number * self.record) != self.record:
                return None
        except OSError:
            return None
        return data if entry == _head(key, data) else None

    def append(self, keys: list[bytes], records: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Write records, then their entries. A failure half-way (OSError) leaves no entry."""
        entries = b""
        for n, (key, data) in enumerate(zip(keys, records, strict=True)):
            _write_all(self._data, data, (self._entries + n) * self.record)
            head = _head(key, data)
            entries += head + zlib.crc32(head).to_bytes(4, "little")
        _write_all(self._index, entries, self._entries * ENTRY)
        return self._keep(entries)

    def close(self) -> None:
        os.close(self._data)
        os.close(self._index)


def _head(key: bytes, data: bytes | bytearray) -> bytes:
    """The entry of a record, without its own checksum."""
    return key + zlib.crc32(data).to_bytes(4, "little")


def _write_all(handle: int, data: bytes, offset: int) -> None:
    """Write all bytes: an almost full disk takes some of them, and reports the error at the next call."""
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def used_and_free(folder: Path) -> tuple[int, int]:
    """Bytes of all segments in a folder and beside it, and free bytes of its disk."""
    root = folder.parent
    used = 0
    for file in root.glob("*/*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            used += file.stat().st_size
    disk = os.statvfs(next(path for path in (root, *root.parents) if path.exists()))
    return used, disk.f_bavail * disk.f_frsize


def measure_reading(root: Path, record: int, readers: int = 1) -> float | None:
    """Seconds per record that is read below `root` and is not in the page cache, by so many readers at once.

    None if none can be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as file:
            for _ in range(readers):
                file.write(os.urandom(record) * PROBES)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

            def read(first: int) -> None:
                for n in range(first, first + PROBES):
                    zlib.crc32(os.pread(file.fileno(), record, n * record))

            with ThreadPoolExecutor(readers) as threads:
                begun = time.perf_counter()
                list(threads.map(read, range(0, readers * PROBES, PROBES)))
                return (time.perf_counter() - begun) / (readers * PROBES)
    except OSError:
        return None


def _short(key: bytes) -> int:
    return int.from_bytes(key[:8], "little")
