"""Write files that are complete or absent: write a temporary file beside the target, sync it, rename it.

The temporary file is called `.NAME.xxxxxxxx.tmp` and is locked while a process writes it. A killed process leaves its
file without a lock, and `sweep` removes such files. A file that only one process at a time may write has a `Lock`.
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
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from minimind_v.core.errors import MmvError, RunError, WeightsError

MOST_JSON = 16 << 20  # bytes of a JSON that comes with weights


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` with a file that becomes `path` when it is complete; an older file stays until then.

    A device or a pipe is written directly, never replaced by a file.
    Raises RunError where the disk is full or the folder is read-only.
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
            if os.name != "nt":  # while it is open it is locked, and no process sweeps it
                os.replace(name, path)
        if os.name == "nt":  # no open file can be renamed there, and there are no locks
            os.replace(name, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        kept = "; the older file is unchanged" if path.exists() else ""
        raise RunError(f"{path}: not saved ({_reason(error)}){kept}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _temporary(path: Path) -> tuple[int, str]:
    """Create a locked file beside `path`; return its handle and its name."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        _lock(handle)
        with contextlib.suppress(FileNotFoundError):  # swept before it was locked
            if os.path.samestat(os.fstat(handle), os.stat(name)):
                return handle, name
        os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object that belongs to weights; None without the file. Raises WeightsError for anything else."""
    if not path.is_file():
        return None
    try:
        if (size := path.stat().st_size) > MOST_JSON:
            raise ValueError(f"it has {size:,} bytes; the maximum is {MOST_JSON:,}")
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not even text, or lists in lists in lists
        raise WeightsError(f"{path}: not JSON ({error}) — download the file again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: not a JSON object — download the file again")
    return value


def bounded_lines(path: Path, longest: int) -> Iterator[bytes | None]:
    """Yield the lines of a regular file with their ends, None for one of more bytes than `longest`; no other file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(longest + 1):
            if len(line) <= longest or line.endswith(b"\n"):
                yield line
                continue
            while (rest := file.readline(longest)) and not rest.endswith(b"\n"):
                pass
            yield None


def read_notes(path: Path) -> dict[str, Any]:
    """Return a JSON object that `mmv` wrote earlier; an empty one where it is missing or damaged."""
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else None  # not from a pipe, which may never end
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def object_in(notes: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the object under a key of JSON from an untrusted file; an empty one for anything else."""
    value = notes.get(key)
    return value if isinstance(value, dict) else {}


def read_asset(package: str, name: str) -> str:
    """Return a text in the folder `assets` of a package, such as `minimind_v.core.formats.hf`."""
    return resources.files(package).joinpath("assets", name).read_text(encoding="utf-8")


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def umask() -> int:
    """Return the umask of this process."""
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
    """Write a small text file atomically; bytes of names that are not UTF-8 become escapes."""
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def as_json(value: Any, encoding: str = "utf-8") -> str:
    """Return JSON on one line; characters that the encoding lacks become escapes."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value, default=str)
    return text


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Keep `path` locked, so that no other process sweeps it as a leftover."""
    handle = os.open(path, os.O_RDONLY)
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def sweep(path: Path, patience: float = 0.0) -> bool:
    """Remove leftovers of dead processes that were writing `path`, never a file of a living one.

    Returns whether a living process writes `path` now. An older `path` that was moved aside is put back where the new
    one never came. The locks of a killed process need up to `patience` seconds to be released.
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
    """Keep all other processes from writing `path`; leftovers of dead ones are removed.

    Raises RunError where another process writes it. Checks of `path` that ran before must run again.
    """
    note = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        lock = Lock(path.with_name(f".{path.name}.lock"), note)
    except Held as other:
        raise RunError(
            f"{path}: another process is writing it ({describe_holder(other.note)}) — wait for its end, "
            "or name another path"
        ) from None
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        sweep(path, patience=1.0)
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Return whether a process holds the `Lock` of this file; on a system without locks, whether the file exists."""
    with _left(path) as dead:
        return not dead


def describe_holder(note: Mapping[str, Any]) -> str:
    """Describe the process that wrote a lock's note."""
    if "process" not in note:
        return "its lock file does not name the process"
    return f"process {note['process']} on {note.get('host')}, since {note.get('since')}"


def _remove_if_left(left: Path, path: Path) -> bool:
    """Remove a leftover, or put it back where `path` is gone; return False where a living process uses it."""
    with _left(left.with_suffix(".tmp")) as dead:
        if dead and left.suffix == ".old" and not path.exists():
            left.rename(path)
        elif dead:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return dead


@contextlib.contextmanager
def _left(path: Path) -> Iterator[bool]:
    """Whether no process uses a file or folder; it stays locked inside the block."""
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
    """Another process holds the lock; `note` is what that process wrote about itself, empty where unreadable."""

    def __init__(self, note: dict[str, Any]) -> None:
        super().__init__(note)
        self.note = note


class Lock:
    """A lock file that one process at a time holds.

    The operating system keeps the lock: a killed process loses it, and the file that is left blocks no one. Forked
    children do not inherit it, so a data worker that outlives its parent does not keep it.
    """

    def __init__(self, path: Path, note: dict[str, Any], patience: float = 3.0) -> None:
        """Take the lock and write `note` into the file for other processes to read.

        The system frees the memory of a killed process before its locks, so this waits up to `patience` seconds.
        Raises Held after that, and OSError where the file cannot be created.
        """
        self.path, self._process = path, os.getpid()
        self._new_folders = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        handle, self.certain = self._take(time.monotonic() + patience)  # certain: the file system has locks
        self.left = _read_note(handle)  # by a killed process; empty without one
        self._handle = handle
        _HELD.add(handle)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a note
            os.ftruncate(handle, 0)
            os.pwrite(handle, as_json(note).encode(), 0)

    def release(self) -> None:
        """Release the lock and remove its file."""
        if os.getpid() != self._process or self._handle not in _HELD:
            return
        with contextlib.suppress(OSError):
            if self._is_there(self._handle):  # and not another's, after ours was removed
                self.path.unlink()  # while it is held: a process that has opened it notices
        _HELD.discard(self._handle)
        os.close(self._handle)
        for folder in self._new_folders:  # if they are empty
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
        for _ in range(20):  # another process may remove its new folder before it has a file
            with contextlib.suppress(FileNotFoundError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path.parent))

    def _is_there(self, handle: int) -> bool:
        """Whether the file still has its name: a lock on a removed file protects nothing."""
        try:
            return os.path.samestat(os.fstat(handle), self.path.stat())
        except FileNotFoundError:
            return False


_HELD: set[int] = set()  # handles of locks


def _forget_locks() -> None:
    """Close the lock files in a forked child, else the lock would last as long as the child."""
    while _HELD:
        with contextlib.suppress(OSError):
            os.close(_HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _lock_alone(handle: int) -> bool | None:
    """Return whether this process got the lock; None where the system or file system has no locks."""
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
def disk_errors(folder: Path, what: str = "export") -> Iterator[None]:
    """Turn the different errors of libraries on a full disk into one RunError: `what` cannot be written in `folder`."""
    from safetensors import SafetensorError

    try:
        yield
    except MmvError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{folder}: the {what} cannot be written there ({_reason(error)}); nothing was written"
        ) from error


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
