"""Files that are whole or absent: written beside, synced, then renamed.

What is being written is called `.NAME.xxxxxxxx.tmp` and locked as long as a process writes it. A process that is killed
leaves it behind, unlocked: `sweep` removes that. What only one process at a time may write has a `Lock`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from minimind_v.core.errors import MmvError, RunError, WeightsError

MOST_JSON = 16 << 20  # bytes of a JSON that comes with weights


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Give `write` a file that becomes `path` only when it is complete. What stood there before stays till then.

    A device or a pipe is written into: nobody who names one wants it replaced by a file.
    Raises RunError where the disk is full or the folder cannot be written.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        _write_into(path, write)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        handle, name = _temporary(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~umask())
            if os.name != "nt":  # as long as it is open it is locked, and nobody sweeps it away
                os.replace(name, path)
        if os.name == "nt":  # where no open file gets another name, and there are no locks
            os.replace(name, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        kept = "; what stood there before is still there" if path.exists() else ""
        raise RunError(f"{path}: not saved ({_reason(error)}){kept}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside `path` that is locked: its handle and its name."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        _lock(handle)
        with contextlib.suppress(FileNotFoundError):  # swept before it was locked
            if os.path.samestat(os.fstat(handle), os.stat(name)):
                return handle, name
        os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object that came with weights; None where there is no file. Raises WeightsError for anything else."""
    if not path.is_file():
        return None
    try:
        if (size := path.stat().st_size) > MOST_JSON:
            raise ValueError(f"it has {size:,} bytes, the most is {MOST_JSON:,}")
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not even text, or lists in lists in lists
        raise WeightsError(f"{path}: not JSON ({error}) — download the file again") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: not a JSON object — download the file again")
    return found


def read_notes(path: Path) -> dict[str, Any]:
    """A JSON object that `mmv` noted; an empty one where it is absent or has become something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def object_in(notes: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under a key of JSON that anybody may have changed; an empty one for anything else."""
    value = notes.get(key)
    return value if isinstance(value, dict) else {}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(part.stat().st_size for part in (path, *path.rglob("*")) if part.is_file())


def umask() -> int:
    """The permissions that this process takes from what it makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_into(path: Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        with path.open("wb") as file:
            write(file)
    except BrokenPipeError:
        raise
    except (OSError, RuntimeError) as error:
        raise RunError(f"{path}: not written ({_reason(error)})") from error


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically. Of names that are no UTF-8 the odd bytes become escapes, as JSON has them."""
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def as_json(value: Any, encoding: str = "utf-8") -> str:
    """JSON on one line, readable where it can be: what an encoding lacks can only be written as an escape."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value, default=str)
    return text


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """While this lasts no other process takes `path` for something that a dead one left."""
    handle = os.open(path, os.O_RDONLY)
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def sweep(path: Path, patience: float = 0.0) -> bool:
    """Remove what processes that are dead have left of writing `path`; never what a living one uses.

    Returns whether a living one writes it now. What was moved aside for a new `path` that never came is put back. A
    process that was killed needs a moment before its locks are free: up to `patience` seconds.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.(tmp|old)")
    end, in_use = time.monotonic() + patience, False
    with contextlib.suppress(OSError):  # no folder, no rights: then nothing can be removed
        for name in sorted(entry.name for entry in os.scandir(path.parent) if ours.fullmatch(entry.name)):
            left = path.with_name(name)
            while not (gone := _remove_if_left(left, path)) and time.monotonic() < end:
                time.sleep(0.05)
            in_use |= not gone
    return in_use


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """While this lasts no other process writes `path`; what dead ones have left of it is gone.

    Raises RunError where another is at it. What was asked of `path` before must be asked again.
    """
    note = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        lock = Lock(path.with_name(f".{path.name}.lock"), note)
    except Held as other:
        raise RunError(
            f"{path}: another run is writing it ({describe_holder(other.note)}) — wait for that, or name another place"
        ) from None
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        sweep(path, patience=1.0)
        yield
    finally:
        lock.release()


def describe_holder(note: Mapping[str, Any]) -> str:
    """The process that a lock's note tells of."""
    if "process" not in note:
        return "it has not said which process it is"
    return f"process {note['process']} on {note.get('host')}, since {note.get('since')}"


def _remove_if_left(left: Path, path: Path) -> bool:
    """Remove what a dead process has left, or put it back where `path` has gone; False where a living one uses it."""
    with _left(left.with_suffix(".tmp")) as dead:
        if dead and left.suffix == ".old" and not path.exists():
            left.rename(path)
        elif dead:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return dead


@contextlib.contextmanager
def _left(path: Path) -> Iterator[bool]:
    """Whether nobody uses a file or folder, which may be gone already; nobody begins to while this lasts."""
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY)
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        dead = True
    except FileNotFoundError:
        dead = True
    except (OSError, ImportError):  # in use, or of a system without locks
        dead = False
    try:
        yield dead
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int) -> None:
    with contextlib.suppress(OSError, ImportError):  # some systems have no locks, and then nothing is ever swept there
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_SH)


class Held(Exception):
    """Another process has the lock; `note` is what it wrote about itself, empty where that cannot be read."""

    def __init__(self, note: dict[str, Any]) -> None:
        super().__init__(note)
        self.note = note


class Lock:
    """A file that one process at a time holds.

    The operating system holds the lock, not the file: a process that is killed loses it, and what it leaves of the file
    stops nobody. Forked children do not inherit it, so a data worker that outlives its parent does not keep it.
    """

    def __init__(self, path: Path, note: dict[str, Any], patience: float = 3.0) -> None:
        """Take the lock and write `note` into the file, for others to read.

        A process that was killed needs a moment to give its memory back before its locks, so another's lock is waited
        for, up to `patience` seconds. Raises Held after that, and OSError where no file can be made.
        """
        self.path, self._process = path, os.getpid()
        self._new_folders = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        handle, self.certain = self._take(time.monotonic() + patience)  # certain: the file system has locks
        self.left = _read_note(handle)  # by a process that did not come to its end; empty where there was none
        self._handle = handle
        _HELD.add(handle)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a note
            os.ftruncate(handle, 0)
            os.pwrite(handle, as_json(note).encode(), 0)

    def release(self) -> None:
        """Give the lock back, and leave no trace of it."""
        if os.getpid() != self._process or self._handle not in _HELD:
            return
        with contextlib.suppress(OSError):
            if self._is_there(self._handle):  # and not another's, where somebody removed ours
                self.path.unlink()  # while it is held: whoever has opened it meanwhile notices
        _HELD.discard(self._handle)
        os.close(self._handle)
        for folder in self._new_folders:  # that nothing was written into
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _take(self, end: float) -> tuple[int, bool]:
        while True:
            handle = self._open()
            locked = _lock_alone(handle)
            if locked is not False and self._is_there(handle):
                return handle, locked is True
            other = _read_note(handle)
            os.close(handle)
            if locked is False and time.monotonic() > end:
                raise Held(other)
            time.sleep(0.05)

    def _open(self) -> int:
        for _ in range(20):  # another process may remove a folder that it made before there is a file in it
            with contextlib.suppress(FileNotFoundError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path.parent))

    def _is_there(self, handle: int) -> bool:
        """Whether the file still has its name: its holder removes it, and then the lock is worth nothing."""
        try:
            return os.path.samestat(os.fstat(handle), self.path.stat())
        except FileNotFoundError:
            return False


_HELD: set[int] = set()  # handles of locks


def _forget_locks() -> None:
    """A forked child closes its copies, else the lock would last as long as the child."""
    while _HELD:
        with contextlib.suppress(OSError):
            os.close(_HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _lock_alone(handle: int) -> bool | None:
    """Whether this process got the lock; None where the system or the file system has none."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return None
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def _read_note(handle: int) -> dict[str, Any]:
    try:
        note = json.loads(os.pread(handle, 1 << 16, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what libraries say of a full disk, each in its own way, into a RunError that names `folder`."""
    from safetensors import SafetensorError

    try:
        yield
    except MmvError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{folder}: the export cannot be written there ({_reason(error)}); nothing is left") from error


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]
