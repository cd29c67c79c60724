"""Extensions: files and modules of the user that add entries to the tables of this package (towers, projectors …)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from minimind_v.core.errors import MmvError, RunError, UsageError

Entry = TypeVar("Entry")
VARIABLE = "MMV_EXTENSIONS"  # files (`….py`) or names of modules, separated as the folders in PATH are


_importing: list[str] = []  # the extension whose code runs


class Table(MutableMapping[str, Entry]):
    """Entries by name. Extensions add some, and never replace those of the package or of one another: files name their
    parts by them.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries, self.own, self._extensions = dict(entries), tuple(entries), dict[str, str]()

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __setitem__(self, name: str, entry: Entry) -> None:
        """Raises UsageError for a name of the package, and in an extension for one of another extension."""
        if name in self.own and name in self._entries:
            raise UsageError(f"{name} exists; choose another name (taken: {', '.join(self.own)})")
        if _importing and (other := self._extensions.setdefault(name, _importing[-1])) != _importing[-1]:
            raise UsageError(f"{name} exists, added by {other}; rename one of the two")
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]
        self._extensions.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load_extensions() -> list[ModuleType]:
    """Import the files and modules of MMV_EXTENSIONS, once in each process: their code runs.

    Processes that this one starts inherit the variable. Raises UsageError with the extension and its error.
    """
    modules = []
    for name in _names():
        _importing.append(name)
        try:
            modules.append(_import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name))
        except MmvError as error:
            raise UsageError(f"{VARIABLE}: {name}: {error}") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            raise UsageError(f"{VARIABLE}: {name} cannot be imported ({reason})") from error
        finally:
            _importing.pop()
    return modules


def _names() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]


def error_of_extension(error: Exception) -> RunError | None:
    """The same error with the line of the extension that raised it or called what did; None without an extension.

    A process reports it in place of the error: only a message reaches other processes whole.
    """
    names = {Path(name).stem if name.endswith(".py") else name for name in _names()}
    lines = [f"{frame.f_code.co_filename}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)
             if frame.f_globals.get("__name__") in names]  # fmt: skip
    if isinstance(error, MmvError | OSError) or not lines:
        return None
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return RunError(f"{lines[-1]}: {reason} — an error in this extension")


def extensions_digest() -> str | None:
    """The digest of the extensions' files, which decide the numbers of a run; None without any."""
    files = [Path(module.__file__) for module in load_extensions() if module.__file__]
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest() if files else None


def _import_file(path: Path) -> ModuleType:
    """Import a file under its own name, so that other processes find its classes."""
    if module := sys.modules.get(path.stem):
        if module.__file__ and path.exists() and Path(module.__file__).samefile(path):
            return module
        raise ImportError(f"another module is called {path.stem}: rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve(strict=True))
    assert spec is not None, "the name ends in .py"
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
