"""Looks at rows and sets as lines for a terminal: pieces of text, each with the name of a style ("" for none).

Marks say what colours say, for those who see none: «learnt», ‹special›, [-cut off-].
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from minimind_v.core.curate.preview import TEXT_ROW, RowView
from minimind_v.core.curate.token_text import Piece, visible
from minimind_v.core.rows.row import describe_notes, describe_text_rows
from minimind_v.core.wording import plural

BAR = 40  # characters of the longest bar
LEARNT, SPECIAL, PICTURE, CUT, DIM, BOLD = "green", "magenta", "blue", "red", "dim", "bold"

Line = list[tuple[str, str]]


def row_lines(view: RowView) -> Iterator[Line]:
    """One row, for reading."""
    lost = view.whole - len(view.tokens)
    yield [(f"── {visible(view.place)}", BOLD), (f" skipped: {visible(view.trouble)}" if view.trouble else "", CUT)]
    for number, one in enumerate(view.pictures, 1):
        size = f"{visible(one.name)}, {one.width}×{one.height}, {1 - one.kept:.0%} outside the crop"
        yield [(f"picture {number}: {visible(one.trouble) or size}", DIM)]
    if view.whole:
        told = (
            f"{plural(len(view.tokens), 'token')}, {sum(view.tokens.image_mask)} of pictures, {view.supervised} learnt"
        )
        if lost:
            told += f"; {lost} cut off, {view.answers_lost} of them of answers"
        if view.batch:
            told += f"; {view.batch.length - len(view.tokens)} of padding in its batch"
        yield [(told, DIM)]
    line: Line = []
    for (style, opens, closes), run in groupby(view.pieces, _look):
        text = "".join(map(_text, run))
        *full, rest = text.removesuffix("\n").split("\n")
        line.append((opens, style))
        for part in full:
            yield [*line, (visible(part) + "↵", style)]
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
        yield [("a last question without an answer is left out: ", DIM), (visible(view.unanswered), CUT)]
    if view.source:
        yield from ([(visible(line), DIM)] for line in view.source.split("\n"))
    yield [("", "")]


def _text(piece: Piece) -> str:
    if piece.picture is not None:
        return f"[picture {piece.picture + 1}: {len(piece.ids)} patches]"
    return piece.text if piece.text or not piece.parts else f"[bytes {piece.parts[0]}]"


def _look(piece: Piece) -> tuple[str, str, str]:
    """Style, and marks before and behind."""
    if piece.removed:
        return CUT, "[-", "-]"
    if piece.supervised:
        return LEARNT, "«", "»"
    if piece.special:
        return SPECIAL, "", ""
    return (PICTURE if piece.picture is not None else ""), "", ""


def stats_lines(report: dict[str, Any]) -> Iterator[Line]:
    """A report of `stats.look_at`, for reading."""
    yield [
        (
            f"{plural(report['rows'], 'row')} of {visible(report['file'])}, looked at as {report['stage']} reads them",
            BOLD,
        )
    ]
    if report["sample"]:
        yield [(f"a sample: the first {plural(report['looked_at'], 'row')} in the order of the first epoch", DIM)]
    yield [("", "")]
    yield from _quantile_lines(report)
    yield [("", "")]
    yield [("tokens per row, before truncation", BOLD)]
    yield from _histogram_lines(report["histogram"], report["max_length"])
    yield [("", "")]
    yield from ([(f"{name:<12}", DIM), (value, "")] for name, value in summary(report).items())


def _quantile_lines(report: dict[str, Any]) -> Iterator[Line]:
    tables = table_of_quantiles(report)
    names = list(next(iter(tables.values())))
    yield [("".join([" " * 18, *(f"{name:>9}" for name in names)]), DIM)]
    for what, row in tables.items():
        yield [(f"{what:<18}", DIM), ("".join(f"{value:>9,}" for value in row.values()), "")]


def table_of_quantiles(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What there are quantiles of, by the name to show."""
    tokens = {f"tokens, {name}" if name != "total" else "tokens": row for name, row in report["tokens"].items()}
    rows = {"turns": report["turns"], "pictures": report["images"]} | tokens
    return {what: {name: value for name, value in row.items() if name != "sum"} for what, row in rows.items()}


def _histogram_lines(found: dict[str, list[int]], max_length: int) -> Iterator[Line]:
    edges, counts = found["edges"], found["counts"]
    most = max(counts, default=1) or 1
    for number, (begin, rows) in enumerate(zip(edges, counts, strict=False)):
        last = number == len(counts) - 1
        bar = "█" * round(BAR * rows / most) or ("▏" if rows else "")
        label = f"from {begin:,}" if last else f"{begin:,}–{edges[number + 1] - 1:,}"
        style = CUT if begin > max_length else LEARNT
        yield [(f"{label:>15} ", DIM), (f"{bar:<{BAR}} ", style), (f"{rows:,}", "")]


def summary(report: dict[str, Any]) -> dict[str, str]:
    """The rest of a report in words, by name."""
    skipped, cut, training = report["skipped"], report["cut"], report["training"]
    kinds = ", ".join(f"{number} {kind}" for kind, number in skipped["kinds"].items())
    found = {
        "languages": ", ".join(f"{name} {share:.1%}" for name, share in report["languages"].items()) + " (by script)",
        "skipped": f"{plural(skipped['rows'], 'row')} ({skipped['share']:.2%}){f': {kinds}' if kinds else ''}"
        + ("; training would refuse so many" if skipped["refused"] else "")
        + "; pictures were not opened, `mmv data check` does",
        **({"text rows": describe_text_rows(report["text_rows"], report["looked_at"])} if report["text_rows"] else {}),
        **({"read as": "; ".join(notes)} if (notes := describe_notes(report["notes"], report["looked_at"])) else {}),
        "cut": f"{plural(cut['rows'], 'row')} ({cut['share']:.2%}) at {report['max_length']} tokens, "
        f"{plural(cut['turns'], 'turn')} and {plural(cut['answer_tokens'], 'answer token')} "
        f"({cut['answer_tokens_share']:.2%}) with them",
        "padding": f"{report['padding']['batches']:.2%} in training's batches; "
        f"{report['padding']['fixed']:.1%} if every row were filled up to {report['max_length']}",
        "updates": f"{training['updates']:,}: {plural(training['epochs'], 'epoch')} in batches of "
        f"{training['batch_size']}, {training['accumulate']} per update; "
        f"{plural(training['supervised_tokens'], 'token')} learnt",
    }
    seconds = report["time"]["seconds"]
    found["time"] = f"{_duration(seconds)} — {report['time']['how']}" if seconds else report["time"]["how"]
    return found


def _duration(seconds: float) -> str:
    for limit, unit, name in (
        (90, 1, "seconds"),
        (5400, 60, "minutes"),
        (172800, 3600, "hours"),
        (1e99, 86400, "days"),
    ):
        if seconds < limit:
            return f"about {seconds / unit:.{0 if seconds / unit >= 10 else 1}f} {name}"
    raise AssertionError(seconds)
