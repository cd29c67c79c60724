"""Numbers in words."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """Return `1 row`, `2 rows` or `0 rows`: the number with the noun in singular or plural."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def answer_text(answer: object) -> str:
    """An answer, or those of several seeds; an empty one becomes `(empty)`."""
    if isinstance(answer, list):
        return " · ".join(map(answer_text, answer))
    text = "" if answer is None else str(answer)
    return text if text.strip() else "(empty)"


def size(count: int) -> str:
    """`512 bytes`, `3.6 kB` or `19.6 MB`."""
    if count < 1000:
        return plural(count, "byte")
    return f"{count / 1e3:,.1f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"


def chance(p: float) -> str:
    """The probability of a difference this large by chance."""
    return f"p {p:.2g}" if p >= 0.001 else "p below 0.001"
