"""The receipt of a folder's downloads. With it the next download needs neither the hub nor the files' bytes to know
that nothing is missing and nothing has changed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minimind_v.core.errors import unusable
from minimind_v.core.files import write_text

KEPT_TEXTS = ("sha256", "hub", "repo", "commit", "remote")
STAGING = ".mmv-download"  # inside the target folder, so that a finished part is renamed, never copied


@dataclass(frozen=True)
class Kept:
    """A verified file, with its size and time at that moment."""

    size: int
    mtime_ns: int
    sha256: str
    hub: str
    repo: str
    commit: str
    remote: str  # its name in the repository

    def looks_the_same(self, path: Path) -> bool:
        try:
            status = path.stat()
        except OSError:
            return False
        return path.is_file() and (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)


@dataclass
class Receipt:
    """The receipt of one target folder. A damaged one counts as empty: everything is verified again."""

    folder: Path
    files: dict[str, Kept] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)  # "hub repo@revision" → the commit it was at the first time
    download_parts: dict[str, list[str]] = field(default_factory=dict)  # request → names of its files

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        try:
            notes = json.loads((folder / STAGING / "receipt.json").read_text(encoding="utf-8"))
            files = {name: Kept(**kept) for name, kept in notes["files"].items()}
            receipt = cls(
                folder, files, dict(notes["commits"]), {key: list(names) for key, names in notes["wants"].items()}
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return cls(folder)
        return receipt if receipt._whole() else cls(folder)

    def _whole(self) -> bool:
        """Whether all values are of their types, and all names are of files in this folder."""
        texts = [getattr(kept, name) for kept in self.files.values() for name in KEPT_TEXTS]
        texts += [*self.commits.values(), *(name for names in self.download_parts.values() for name in names)]
        numbers = [number for kept in self.files.values() for number in (kept.size, kept.mtime_ns)]
        right = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
        return right and not any(unusable(name) or Path(name).name != name for name in self.files)

    def write(self) -> None:
        notes: dict[str, Any] = {
            "files": {name: asdict(kept) for name, kept in self.files.items()},
            "commits": self.commits,
            "wants": self.download_parts,
        }
        write_text(self.folder / STAGING / "receipt.json", json.dumps(notes, indent=1) + "\n")

    def record(self, name: str, kept: Kept) -> None:
        """Add a file. Earlier requests with a file of that name are no longer complete."""
        self.files[name] = kept
        for request in [request for request, names in self.download_parts.items() if name in names]:
            del self.download_parts[request]

    def answers(self, request: str, repo: str) -> dict[str, Kept] | None:
        """The files of a request to `repo`, if all of them exist unchanged; else None."""
        names = self.download_parts.get(request)
        if not names or not all(name in self.files and self.files[name].repo == repo for name in names):
            return None
        files = {name: self.files[name] for name in names}
        return files if all(kept.looks_the_same(self.folder / name) for name, kept in files.items()) else None
