"""`mmv runs`: the runs and weights of a folder, one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import readable
from minimind_v.core.paths import OUT_DIR

if TYPE_CHECKING:
    from minimind_v.core.formats.inventory import Entry

HEADINGS = ("name", "stage", "model", "steps", "loss", "date", "size")
LESS = ("size", "date", "stage")  # the columns that a narrow terminal lacks first


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", envvar=options.ENVIRONMENT["out"], help="The --out folder of the runs.")
    ] = OUT_DIR,
    json: options.Json = False,
) -> None:
    """List the runs, weights and exported folders in a folder, the newest first."""
    from minimind_v.core.formats.inventory import list_runs

    entries, terminal = list_runs(folder), Terminal()
    if json:
        terminal.json({"folder": str(folder), "runs": [asdict(entry) for entry in entries]})
        return
    if not entries:
        terminal.say(f"no runs or weights in {folder} — start with `mmv train pretrain` or `mmv demo`")
        return
    rows = _aligned([HEADINGS, *map(_cells, entries)], terminal.out.width if terminal.out.is_terminal else None)
    notes = ["", *(f"  unreadable: {readable(entry.damage)}" if entry.damage else "" for entry in entries)]
    for row, note in zip(rows, notes, strict=True):
        terminal.result((row + note).rstrip())


def _aligned(rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """The rows of a table as lines, without its columns of LESS where a terminal of this width lacks the room."""
    lengths = {column: max(len(row[column]) for row in rows) for column in range(len(HEADINGS))}
    for name in LESS:
        if width is not None and sum(lengths.values()) + 2 * (len(lengths) - 1) > width:
            del lengths[HEADINGS.index(name)]
    return ["  ".join(row[column].ljust(length) for column, length in lengths.items()) for row in rows]


def _cells(entry: Entry) -> tuple[str, ...]:
    if entry.steps is None:
        steps = "–"
    elif entry.total_steps and entry.total_steps > entry.steps:
        steps = f"{entry.steps:,} of {entry.total_steps:,}"
    else:
        steps = f"{entry.steps:,}"
    loss = "–" if entry.loss is None else f"{entry.loss:.4f}"
    size = f"{entry.bytes / 1e6:,.1f} MB"
    return readable(entry.name), entry.stage, entry.model, steps, loss, entry.modified.replace("T", " ")[:16], size
