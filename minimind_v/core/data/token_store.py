"""A file beside the data that caches the token ids of its rows, so that each row is tokenised once.

The file has a table with one entry per row, and then records in the order of writing. A process appends records, then
writes their entries; all others can read an entry at once. One checksum proves an entry and another its record, so that
no reader mistakes the remains of a killed writer, two writers at once, a crash of the machine or a damaged disk for a
row's tokens: it tokenises such a row again. The head of the file identifies all inputs of the tokens (see `identify`);
a file with another head is replaced.

The processes of one machine share the work. They tokenise rows in chunks, and a lock of the system on each chunk, which
ends with its process, keeps two from the same work. Without locks, or if a process stops in the middle of a chunk, the
same rows are tokenised twice.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers

from minimind_v.core.data.dataset import BrokenRow, Example, RowDataset
from minimind_v.core.data.prompt import PackedTokens
from minimind_v.core.errors import RunError, UsageError
from minimind_v.core.files import sweep, write_atomically
from minimind_v.core.rows.row import NOTES

MAGIC = b"mmv tokens 1\n"
HEAD = 64  # bytes: the magic words, the identity, zeros
ENTRY = np.dtype([("offset", "<u8"), ("size", "<u4"), ("length", "<u4"), ("check", "<u8")])
# Checksum of the rest · row · tokens · images · answers · cut · images without a mark · notes · bytes of names
RECORD = struct.Struct("<IQIIIIIII")
CHUNK = 16  # rows that a process tokenises under one lock
PATIENCE = 5.0  # seconds to wait for chunks of other processes before this process tokenises them too
RESERVE = 2**28  # bytes that must stay free on a disk
MOST = 4  # files of one data file, with different settings; the least recently used are removed
PASSING = {"parquet"}  # kinds of broken rows that may be a passing reading error

Text = Example | BrokenRow  # a row's tokens, or why it has none


class TokenStore:
    """Tokens by row. Cheap to pickle; each process, forked or spawned, opens the file itself."""

    def __init__(self, path: Path, rows: int, identity: bytes, wide: bool) -> None:
        """Raises OSError if the file cannot be made; `wide` is for ids of more than 16 bits."""
        self.path, self.rows, self.identity = path, rows, identity
        self.ids = np.dtype("<u4" if wide else "<u2")
        self._forget()
        if self._open():
            with contextlib.suppress(OSError):  # the file of another user
                os.utime(path)
        else:
            sweep(path)
            _refuse_a_full_disk(path.parent)
            try:
                write_atomically(path, self._begin)
            except RunError as error:
                raise error.__cause__ if isinstance(error.__cause__, OSError) else OSError(str(error)) from None
            if not self._open():
                raise OSError(self.trouble)
            self._remove_others()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._file: BinaryIO | None = None  # to write entries and read records
        self._end: BinaryIO | None = None  # to append records
        self._table = np.empty(0, ENTRY)
        self.trouble: str | None = None  # why this process writes no more

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "trouble" and name[0] != "_"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._forget()

    # --- the file -----------------------------------------------------------------------------------------------------

    @property
    def _head(self) -> bytes:
        return (MAGIC + self.identity).ljust(HEAD, b"\0")

    def _begin(self, file: BinaryIO) -> None:
        file.write(self._head)
        file.truncate(HEAD + self.rows * ENTRY.itemsize)

    def _open(self) -> bool:
        """Open the file, if it exists and has the right head."""
        self._forget()
        try:
            file = self.path.open("r+b", buffering=0)
            size = HEAD + self.rows * ENTRY.itemsize
            end = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0)
            same = os.path.sameopenfile(file.fileno(), end.fileno())  # and not replaced in between
            if not same or file.read(HEAD) != self._head or os.fstat(file.fileno()).st_size < size:
                raise OSError(errno.ESTALE, "it belongs to other data or is damaged")
        except OSError as error:
            self.trouble = _say(error)
            return False
        self._file, self._end = file, end
        self._table = np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), ENTRY, offset=HEAD)
        return True

    def _mine(self) -> bool:
        """Whether this process has the file open."""
        if self._pid != os.getpid() or (self._file is None and self.trouble is None):
            self._open()
        return self._file is not None

    def _remove_others(self) -> None:
        """Remove the least recently used files of the same data."""
        with contextlib.suppress(OSError):
            begins = self.path.name.rpartition("-")[0]
            beside = [path for path in self.path.parent.iterdir() if path.name.rpartition("-")[0] == begins]
            for path in sorted(beside, key=lambda path: path.stat().st_mtime)[:-MOST]:
                path.unlink()

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, rows: np.ndarray) -> dict[int, Text]:
        """The rows that are stored and undamaged, without images and locations."""
        texts: dict[int, Text] = {}
        rows = rows[self._kept(rows)]
        for row, entry in zip(rows.tolist(), self._table[rows].tolist(), strict=True):
            assert self._file is not None
            data = bytearray(entry[1])
            read = os.preadv(self._file.fileno(), [data], entry[0])
            text = self._decode(row, data) if read == len(data) else None
            if text is not None:
                texts[row] = text
        return texts

    def _kept(self, rows: np.ndarray) -> np.ndarray:
        """Which rows have an entry with a correct checksum, bool [rows]."""
        if not self._mine():
            return np.zeros(len(rows), bool)
        entries = self._table[rows]
        return (entries["offset"] > 0) & (entries["check"] == _check(rows, entries))

    def _decode(self, row: int, data: bytearray) -> Text | None:
        if len(data) < RECORD.size:
            return None
        check, number, length, images, answers, cut, unmarked, notes, named = RECORD.unpack_from(data)
        if check != zlib.crc32(memoryview(data)[4:]) or number != row:
            return None
        bits = -(-length // 8)
        at = RECORD.size + length * self.ids.itemsize
        if at + 2 * bits + named != len(data):
            return None
        names = bytes(data[at + 2 * bits :]).decode("utf-8", "surrogatepass")
        if not length:
            return BrokenRow("", *json.loads(names))
        ids = np.frombuffer(data, self.ids, length, RECORD.size)
        masks = np.unpackbits(np.frombuffer(data, np.uint8, 2 * bits, at).reshape(2, bits), 1, length).view(bool)
        tokens = PackedTokens(ids, masks[0], masks[1], images, answers, cut, unmarked, _notes_of(notes))
        return Example(row, "", tokens, names.split("\n") if names else [])

    def _encode(self, row: int, text: Text) -> bytes:
        if isinstance(text, BrokenRow):
            names = json.dumps([text.kind, text.message]).encode()
            body = RECORD.pack(0, row, 0, 0, 0, 0, 0, 0, len(names)) + names
        else:
            tokens, names = text.tokens, "\n".join(text.names).encode("utf-8", "surrogatepass")
            masks = np.packbits(np.array([tokens.loss_mask, tokens.image_mask], bool), 1)  # [2, ⌈T/8⌉]
            counts = (tokens.images, tokens.answers, tokens.answers_cut, tokens.unmarked, _bits_of(tokens.notes))
            body = RECORD.pack(0, row, len(tokens), *counts, len(names))
            body += np.array(tokens.input_ids, self.ids).tobytes() + masks.tobytes() + names
        return zlib.crc32(memoryview(body)[4:]).to_bytes(4, "little") + body[4:]

    # --- tokenising together ------------------------------------------------------------------------------------------

    def lengths(self, rows: np.ndarray, tokenise: Callable[[int], Text]) -> tuple[np.ndarray, dict[int, Text]]:
        """The number of tokens of each row, 0 for a broken one; and the rows that could not be stored.

        Tokenises and stores the missing rows, together with all processes that need the same rows.
        """
        loose: dict[int, Text] = {}
        chunks = np.split(rows, range(CHUNK, len(rows), CHUNK))
        waited_since: float | None = None
        while chunks := [chunk for chunk in chunks if self._missing(chunk, loose)]:
            alone = self.trouble is not None or (waited_since and time.monotonic() - waited_since > PATIENCE)
            busy = True
            for chunk in chunks:
                with self._claim(int(chunk[0])) as claimed:
                    if claimed or alone:
                        busy = False
                        self._write({row: tokenise(row) for row in self._missing(chunk, loose)}, loose)
            if not busy:
                waited_since = None
            elif waited_since is None:
                waited_since = time.monotonic()
            else:
                time.sleep(0.001)
        lengths = self._table["length"][rows].astype(np.int64) if self._mine() else np.zeros(len(rows), np.int64)
        for at, row in enumerate(rows.tolist() if loose else []):
            if row in loose:
                lengths[at] = _length(loose[row])
        return lengths, loose

    def _missing(self, rows: np.ndarray, loose: dict[int, Text]) -> list[int]:
        return [row for row in rows[~self._kept(rows)].tolist() if row not in loose]

    @contextlib.contextmanager
    def _claim(self, row: int) -> Iterator[bool]:
        """Lock the chunk that begins with this row; whether this process has it."""
        if not self._mine():
            yield True
            return
        try:
            import fcntl
        except ImportError:
            yield True
            return
        assert self._file is not None
        offset = HEAD + row * ENTRY.itemsize
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except OSError as error:  # locked, or a file system without locks
            yield error.errno not in (errno.EACCES, errno.EAGAIN)
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, offset)

    def _write(self, texts: dict[int, Text], loose: dict[int, Text]) -> None:
        """Store rows; those that cannot be stored go to `loose`."""
        for row, text in texts.items():
            if isinstance(text, BrokenRow) and text.kind in PASSING:
                loose[row] = text
        kept = {row: text for row, text in texts.items() if row not in loose}
        if self.trouble is None and kept and self._mine():
            try:
                self._append(kept)
                return
            except OSError as error:
                self.trouble = _say(error)
        loose |= kept

    def _append(self, texts: dict[int, Text]) -> None:
        assert self._file is not None
        assert self._end is not None
        _refuse_a_full_disk(self.path.parent)
        records = [self._encode(row, text) for row, text in texts.items()]
        data = b"".join(records)
        written = self._end.write(data)
        if written != len(data):  # an almost full disk takes some bytes
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sizes = np.array([len(record) for record in records])
        entries = np.zeros(len(records), ENTRY)
        entries["offset"] = self._end.tell() - written + sizes.cumsum() - sizes
        entries["size"], entries["length"] = sizes, [_length(text) for text in texts.values()]
        rows = np.array(list(texts))
        entries["check"] = _check(rows, entries)
        for row, entry in zip(rows.tolist(), entries, strict=True):
            os.pwrite(self._file.fileno(), entry.tobytes(), HEAD + row * ENTRY.itemsize)


def _say(error: OSError) -> str:
    return error.strerror or str(error)


def _bits_of(notes: tuple[str, ...]) -> int:
    return sum(1 << bit for bit, note in enumerate(NOTES) if note in notes)


def _notes_of(bits: int) -> tuple[str, ...]:
    return tuple(note for bit, note in enumerate(NOTES) if bits >> bit & 1) if bits else ()


def _length(text: Text) -> int:
    return len(text.tokens) if isinstance(text, Example) else 0


def _check(rows: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """The checksum of each entry, uint64 [rows], computed at once."""
    mixed = rows.astype(np.uint64) + np.uint64(1)
    for field in ("offset", "size", "length"):
        mixed = (mixed ^ entries[field].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _refuse_a_full_disk(folder: Path) -> None:
    disk = os.statvfs(folder)
    if disk.f_bavail * disk.f_frsize < RESERVE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- which file -------------------------------------------------------------------------------------------------------


def keep_tokens(dataset: RowDataset, data: str, elsewhere: Path, warn: Callable[[str], None]) -> TokenStore | None:
    """The store of a dataset's tokens: beside its file or, if that folder is not writable, in the folder `elsewhere`.

    `data` is a digest of the file. Warns and returns None if no file can be made.
    """
    path, tokenizer = dataset.rows.path.resolve(), dataset.encoder.tokenizer
    settings, identity = identify(dataset, data)
    troubles = []
    for folder in (path.parent, elsewhere):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f".{path.name}.tokens-{settings}.bin"
            return TokenStore(file, len(dataset), identity, tokenizer.vocab_size > 2**16)
        except OSError as error:
            troubles.append(f"{folder}: {_say(error)}")
    warn(not_kept("; ".join(troubles)))
    return None


def not_kept(trouble: str) -> str:
    """The warning of a run that cannot cache tokens."""
    return f"token ids are not cached ({trouble}): every epoch tokenises the rows again"


def identify(dataset: RowDataset, data: str) -> tuple[str, bytes]:
    """The identity of a dataset's tokens: a name for the settings, and a digest of the settings and the data.

    The settings include the code and the tokenizers library. The digest includes the time of the data file, since
    `data` does not cover every byte of a very large file.
    """
    encoder, path = dataset.encoder, dataset.rows.path
    digest = hashlib.blake2b(digest_size=32)
    core = Path(__file__).parents[1]
    for source in (*sorted(core.glob("data/*.py")), *sorted(core.glob("rows/*.py"))):
        digest.update(source.read_bytes())
    digest.update(encoder.tokenizer.backend.to_str().encode())
    layout = encoder.tokenizer.layout
    try:  # it may be the user's own
        digest.update(layout.encode() + Path(inspect.getfile(type(encoder.tokenizer.chat_layout))).read_bytes())
    except (TypeError, OSError):
        raise UsageError(f"data.layout {layout}: its class must be in a file, so that a change is noticed") from None
    settings: list[Any] = [tokenizers.__version__, encoder.tokens_per_image, dataset.max_length]
    settings += [] if dataset.seed is None else [dataset.seed]
    digest.update(json.dumps(settings).encode())
    name = digest.hexdigest()[:8]
    files = getattr(dataset.rows, "files", None) or (sorted(path.rglob("*")) if path.is_dir() else [path])
    digest.update(
        json.dumps([data, dataset.rows.split, len(dataset), *(file.stat().st_mtime_ns for file in files)]).encode()
    )
    return name, digest.digest()
