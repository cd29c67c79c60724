"""What a verification found: a few lines, each with a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """Findings by name, in words, and the names of those that are not good."""

    found: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, found: str, good: bool = True) -> None:
        self.found[name] = found
        if not good:
            self.wrong.append(name)
