"""A value of a row by the name of its field, or a text with fields in double braces: `Question: {{question}}`.

That is what a task's file may write, and what is common in the files of lmms-eval. No expression is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minimind_v.core.errors import RowError, UsageError

BRACES = re.compile(r"\{\{((?:(?!\}\}).)*)\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
# A field, then names and numbers inside it: `choices[0]`, `choices.text`; `.strip()` leaves outer spaces out.
FIELD = re.compile(r"\s*([\w-]+)((?:\.\w+(?!\()|\[\d+\]|\['\w+'\])*)(\.strip\(\))?\s*")
STEP = re.compile(r"\w+")


@dataclass(frozen=True)
class Template:
    """How a value is made from a row; `is_literal`: a text that is not the name of a field stands for itself."""

    text: str | tuple[str, ...]
    is_literal: bool = False

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields of a row that it needs. Raises UsageError for what is no plain field."""
        if not isinstance(self.text, str) or not self.text.strip():
            return ()
        if not BRACES.search(self.text):
            return () if self.is_literal and len(self.text.split()) > 1 else (self.text,)
        matches = [(match[0], FIELD.fullmatch(match[1] or "")) for match in BRACES.finditer(self.text)]
        if wrong := next((text for text, field in matches if field is None), None):
            raise UsageError(
                f"{wrong:.60} is more than a field — write fields in braces only: {{{{question}}}}, {{{{choices[0]}}}}"
            )
        return tuple(dict.fromkeys(field[1] for _, field in matches if field))

    def fill(self, row: Mapping[str, Any]) -> Any:
        """The value for a row; None where the row lacks the field. Raises RowError where a text lacks one."""
        if not isinstance(self.text, str):
            return list(self.text)
        if self.text in row:
            return row[self.text]
        if not BRACES.search(self.text):
            return None if self.text in self.fields else self.text
        if whole := BRACES.fullmatch(self.text):
            return _value(whole[1], row)
        return BRACES.sub(lambda match: _written(_value(match[1], row), match[0]), self.text)


def _value(expression: str, row: Mapping[str, Any]) -> Any:
    match = FIELD.fullmatch(expression)
    assert match is not None, "`fields` has checked it"
    value = row.get(match[1])
    for step in STEP.findall(match[2]):
        try:
            value = value[int(step)] if isinstance(value, list | tuple) else (value or {}).get(step)
        except (LookupError, ValueError, AttributeError):
            value = None
    return value.strip() if match[3] and isinstance(value, str) else value


def _written(value: Any, expression: str) -> str:
    if value is None:
        raise RowError(f"no value for {expression}", "missing field")
    return str(value)
