"""What a target folder remembers of its downloads: enough to prove the next time, without a hub and without reading
the files again, that nothing is missing and nothing has changed.
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
    """A file that was proven, and how it looked then."""

    size: int
    mtime_ns: int
    sha256: str
    hub: str
    repo: str
    commit: str
    remote: str  # its name in the repository

    def looks_the_same(self, path: Path) -> bool:
        try:
            found = path.stat()
        except OSError:
            return False
        return path.is_file() and (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns)


@dataclass
class Receipt:
    """The receipt of one target folder. A damaged one is an empty one: everything is proven again."""

    folder: Path
    files: dict[str, Kept] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)  # "hub repo@revision" → the commit it was at the first time
    download_parts: dict[str, list[str]] = field(default_factory=dict)  # what was asked for → the names that it came to

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        try:
            told = json.loads((folder / STAGING / "receipt.json").read_text(encoding="utf-8"))
            files = {name: Kept(**kept) for name, kept in told["files"].items()}
            receipt = cls(
                folder, files, dict(told["commits"]), {key: list(names) for key, names in told["wants"].items()}
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
        told: dict[str, Any] = {
            "files": {name: asdict(kept) for name, kept in self.files.items()},
            "commits": self.commits,
            "wants": self.download_parts,
        }
        write_text(self.folder / STAGING / "receipt.json", json.dumps(told, indent=1) + "\n")

    def answers(self, want: str) -> dict[str, Kept] | None:
        """The files that `want` came to, where all of them are here and look as they did; else None."""
        names = self.download_parts.get(want)
        if not names or not all(name in self.files for name in names):
            return None
        found = {name: self.files[name] for name in names}
        return found if all(kept.looks_the_same(self.folder / name) for name, kept in found.items()) else None
