"""Numbers in words."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """Return `1 row`, `2 rows` or `0 rows`: the number with the noun in singular or plural."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def chance(p: float) -> str:
    """The probability of a difference this large by chance."""
    return f"p {p:.2g}" if p >= 0.001 else "p below 0.001"
