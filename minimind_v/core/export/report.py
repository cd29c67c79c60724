"""What a verification found: a few lines, each with a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Report:
    """Findings by name, in words, and the names of those that are not good."""

    found: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, found: str, good: bool = True) -> None:
        self.found[name] = found
        if not good:
            self.wrong.append(name)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(part.stat().st_size for part in (path, *path.rglob("*")) if part.is_file())
