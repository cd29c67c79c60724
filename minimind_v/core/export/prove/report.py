"""The report of a verification: a few figures, each with a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """Findings by name, as text, and the names of the wrong ones."""

    summary: str = ""  # in place of the usual one
    findings: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # for `--json`, in place of the findings

    def add(self, name: str, finding: str, good: bool = True) -> None:
        self.findings[name] = finding
        if not good:
            self.wrong.append(name)
