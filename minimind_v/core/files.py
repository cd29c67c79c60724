"""Files that are whole or absent: written beside, synced, then renamed.

What is being written is called `.NAME.xxxxxxxx.tmp` and locked as long as a process writes it. A process that is killed
leaves it behind, unlocked: `sweep` removes that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minimind_v.core.errors import MmvError, RunError, WeightsError


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
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        with os.fdopen(handle, "wb") as file:
            _lock(handle)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~umask())
        os.replace(name, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        kept = "; what stood there before is still there" if path.exists() else ""
        raise RunError(f"{path}: not saved ({_reason(error)}){kept}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object that came with weights; None where there is no file. Raises WeightsError for anything else."""
    if not path.is_file():
        return None
    try:
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
    """Write a small text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


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


def sweep(path: Path) -> None:
    """Remove what processes that are dead have left of writing `path`; never what a living one uses."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.(tmp|old)")
    with contextlib.suppress(OSError):  # no folder, no rights: then nothing can be removed
        for left in sorted(path.parent.iterdir()):
            if ours.fullmatch(left.name) and _is_left(left.with_suffix(".tmp")):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _is_left(path: Path) -> bool:
    """Whether nobody uses a file or folder, which may be gone already."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, ImportError):  # in use, or of a system without locks
        return False
    finally:
        os.close(handle)
    return True


def _lock(handle: int) -> None:
    with contextlib.suppress(OSError, ImportError):  # some systems have no locks, and then nothing is ever swept there
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_SH)


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
