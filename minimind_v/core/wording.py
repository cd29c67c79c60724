"""Small things about words."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """`1 row`, `2 rows`, `0 rows`: the number with the noun in its form."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
