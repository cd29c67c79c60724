"""Figures that a benchmark writes into a page by itself: a block between two markers, the rest left as it is."""

from __future__ import annotations

from pathlib import Path

from minimind_v.core.files import write_text

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


def write_block(page: Path, name: str, text: str) -> None:
    """Put Markdown between the lines `<!-- begin NAME -->` and `<!-- end NAME -->`, in place of what is there.

    Raises SystemExit, with the page untouched, where it does not have each marker once and in this order.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    lines = page.read_bytes().decode().split("\n")
    if (lines.count(begin), lines.count(end)) != (1, 1) or lines.index(begin) > lines.index(end):
        raise SystemExit(f"{page}: needs one line `{begin}` and below it one line `{end}`; nothing was written")
    # Empty lines around it: Markdown does not begin on the line behind a comment.
    write_text(page, "\n".join([*lines[: lines.index(begin) + 1], "", text.strip(), "", *lines[lines.index(end) :]]))
