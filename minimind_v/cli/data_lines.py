"""Rows and statistics as lines for a terminal: pieces of text, each with the name of a style ("" for none).

Marks repeat what colours show: «supervised», [-cut off-].
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from minimind_v.core.curate.preview import TEXT_ROW, RowView
from minimind_v.core.curate.summary import quantile_table, summary
from minimind_v.core.curate.token_text import Piece, visible
from minimind_v.core.wording import plural

BAR = 40  # characters of the longest bar
SUPERVISED, SPECIAL, IMAGE, CUT, DIM, BOLD = "green", "magenta", "blue", "red", "dim", "bold"

Line = list[tuple[str, str]]


def row_lines(view: RowView) -> Iterator[Line]:
    """The lines of one row."""
    lost = view.whole - len(view.tokens)
    yield [(f"── {visible(view.location)}", BOLD), (f" skipped: {visible(view.trouble)}" if view.trouble else "", CUT)]
    for number, image in enumerate(view.pictures, 1):
        size = f"{visible(image.name)}, {image.width}×{image.height}, {image.resizing}"
        yield [(f"image {number}: {visible(image.trouble) or size}", DIM)]
    if view.whole:
        counts = (
            f"{plural(len(view.tokens), 'token')}, {sum(view.tokens.image_mask)} of images, "
            f"{view.supervised} supervised"
        )
        if lost:
            counts += f"; {lost} cut off, {view.answers_lost} of them in answers"
        if view.batch:
            counts += f"; {view.batch.length - len(view.tokens)} padding tokens in its batch"
        yield [(counts, DIM)]
    line: Line = []
    for (style, opens, closes), run in groupby(view.pieces, _marks):
        text = "".join(map(_text, run))
        *full, rest = text.removesuffix("\n").split("\n")
        line.append((opens, style))
        for text_line in full:
            yield [*line, (visible(text_line) + "↵", style)]
            line = []
        line.append((visible(rest) + ("↵" if text.endswith("\n") else "") + closes, style))
        if text.endswith("\n"):
            yield line
            line = []
    if any(text for text, _ in line):
        yield line
    if view.hidden:
        yield [(f"… and {plural(view.hidden, 'more token')}", DIM)]
    if view.unmarked:
        yield [(TEXT_ROW, DIM)]
    if view.unanswered:
        yield [("the last question has no answer and is not used: ", DIM), (visible(view.unanswered), CUT)]
    if view.source:
        yield from ([(visible(line), DIM)] for line in view.source.split("\n"))
    yield [("", "")]


def _text(piece: Piece) -> str:
    if piece.picture is not None:
        return f"[image {piece.picture + 1}: {len(piece.ids)} patches]"
    return piece.text if piece.text or not piece.token_bytes else f"[bytes {piece.token_bytes[0]}]"


def _marks(piece: Piece) -> tuple[str, str, str]:
    """The style of a piece, and the marks before and after it."""
    if piece.removed:
        return CUT, "[-", "-]"
    if piece.supervised:
        return SUPERVISED, "«", "»"
    if piece.special:
        return SPECIAL, "", ""
    return (IMAGE if piece.picture is not None else ""), "", ""


def stats_lines(report: dict[str, Any]) -> Iterator[Line]:
    """The lines of a report of `stats.describe_rows`."""
    title = f"{plural(report['rows'], 'row')} of {visible(report['file'])}, read as {report['stage']} data"
    yield [(title, BOLD)]
    if report["sample"]:
        yield [(f"sample: the first {plural(report['looked_at'], 'row')} of the first epoch", DIM)]
    yield [("", "")]
    yield from _quantile_lines(report)
    yield [("", "")]
    yield [("tokens per row, before truncation", BOLD)]
    yield from _histogram_lines(report["histogram"], report["max_length"])
    yield [("", "")]
    yield from ([(f"{name:<12}", DIM), (value, "")] for name, value in summary(report).items())


def _quantile_lines(report: dict[str, Any]) -> Iterator[Line]:
    tables = quantile_table(report)
    names = list(next(iter(tables.values())))
    yield [("".join([" " * 18, *(f"{name:>9}" for name in names)]), DIM)]
    for what, row in tables.items():
        yield [(f"{what:<18}", DIM), ("".join(f"{value:>9,}" for value in row.values()), "")]


def _histogram_lines(histogram: dict[str, list[int]], max_length: int) -> Iterator[Line]:
    edges, counts = histogram["edges"], histogram["counts"]
    most = max(counts, default=1) or 1
    for number, (begin, rows) in enumerate(zip(edges, counts, strict=False)):
        last = number == len(counts) - 1
        bar = "█" * round(BAR * rows / most) or ("▏" if rows else "")
        label = f"from {begin:,}" if last else f"{begin:,}–{edges[number + 1] - 1:,}"
        style = CUT if begin > max_length else SUPERVISED
        yield [(f"{label:>15} ", DIM), (f"{bar:<{BAR}} ", style), (f"{rows:,}", "")]
