"""A number with its noun."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """Return `1 row`, `2 rows` or `0 rows`: the number with the noun in singular or plural."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
