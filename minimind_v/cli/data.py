"""`mmv data`: look at rows, find what is wrong with them, bring them into another form."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import data_look, options
from minimind_v.cli.command import Command
from minimind_v.cli.data_look import File, Stage
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import open_all
from minimind_v.core.hub.sources import TOKENIZER_DIR
from minimind_v.core.wording import plural

if TYPE_CHECKING:
    from minimind_v.core.curate.check import Report
    from minimind_v.core.rows.row import RowStore

data = typer.Typer(
    no_args_is_help=True, help="Look at rows before a model does: check, stats, preview, convert, split."
)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]


@data.command(cls=Command)
def check(
    file: File,
    split: options.Split = None,
    images: options.Images = None,
    tokenizer: options.TokenizerDir = TOKENIZER_DIR,
    vision_model: options.VisionOfRows = None,
    stage: Stage = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens per row. [default: the stage's]")] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out rows, none of whose pictures may be in here.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a copy (.jsonl or .parquet) of the rows without fault.")
    ] = None,
    overwrite: Overwrite = False,
    json: options.Json = False,
) -> None:
    """Find everything that can be wrong with rows, and what training will do about it. Exit 1 where it would refuse."""
    from minimind_v.core.config.load import images_beside
    from minimind_v.core.curate import check as checking
    from minimind_v.core.curate.convert import find_target
    from minimind_v.core.data.dataset import RowDataset
    from minimind_v.core.machine import check_workers
    from minimind_v.core.rows.splits import SCORE
    from minimind_v.core.rows.stores import open_rows

    check_workers(workers)
    if fix:
        find_target(fix, overwrite, file, images or images_beside(file), against)
    terminal = Terminal()
    recipe, rows, encoder, spec = data_look.open_data(
        terminal, file, split, images, tokenizer, vision_model, stage, against
    )
    dataset = RowDataset(rows, encoder, spec.image_size, max_length or recipe.data.max_length)
    held_out = None
    if against:
        held_out = open_rows(against, images_beside(against) or images, say=terminal.say, order=SCORE)
    with terminal.progress("check") as progress:
        report = checking.check(dataset, workers, held_out, progress)
    found = checking.summary(report, recipe.data.bad_rows)
    if fix:
        found["fixed"] = _fix(terminal, report, rows, fix, overwrite)
    if json:
        terminal.json(found, problems=map(checking.as_json, report.problems()))
    else:
        _show(terminal, found, file)
    if not found["ok"] and fix:
        terminal.say(f"training would refuse {file} ({found['refusal']}), and takes {fix}")
    elif not found["ok"]:
        clean = " — `--fix OUT.jsonl` writes a clean copy" if found["usable"] else ""
        terminal.fail(f"training would refuse: {found['refusal']}{clean}")
        raise typer.Exit(1)


def _fix(terminal: Terminal, report: Report, rows: RowStore, out: Path, overwrite: bool) -> dict[str, Any]:
    import numpy as np

    from minimind_v.core.curate.convert import convert as run
    from minimind_v.core.errors import DataError
    from minimind_v.core.rows.subset import SampledRows

    usable = report.whole & ~report.skipped
    kept = np.flatnonzero(usable & ~report.repeated)
    if not len(kept):
        raise DataError(f"{rows.path}: no row is without fault, so there is nothing to write")
    with terminal.progress("fix") as progress:
        done = run(SampledRows(rows, kept), out, overwrite, progress)
    broken = report.rows - int(usable.sum())
    repeated = report.rows - broken - done.rows
    terminal.say(f"{out}: {plural(done.rows, 'row')}; left out: {broken} broken, {repeated} repeated or held out")
    return {"files": [str(path) for path in done.files], "rows": done.rows, "left_out": broken + repeated}


def _show(terminal: Terminal, found: dict[str, Any], file: Path) -> None:
    for kind, told in found["kinds"].items():
        terminal.result(f"{kind:<18}{told['count']:>8}  training {told['training']}: {', '.join(told['first'])}")
        terminal.result(f"{'':<28}{told['message']}")
    for note in (found["text_rows"], *found["notes"].values()):
        if note["count"]:
            terminal.result(f"information: {note['message']}: {', '.join(note['first'])}")
    terminal.result(f"{file}: {plural(found['rows'], 'row')}, {found['usable']} of them can be trained on")


data.command(cls=Command)(data_look.stats)
data.command(cls=Command)(data_look.preview)


@data.command(cls=Command)
def convert(
    file: File,
    out: Annotated[Path, typer.Argument(help="NAME.parquet, or NAME.jsonl, which gets NAME_images.zip beside it.")],
    split: options.Split = None,
    images: options.Images = None,
    overwrite: Overwrite = False,
    json: options.Json = False,
) -> None:
    """Write rows in another form, pictures to the byte. Stopped and started again, it goes on."""
    from minimind_v.core.config.load import images_beside
    from minimind_v.core.curate.convert import convert as run
    from minimind_v.core.curate.convert import find_target

    terminal = Terminal()
    find_target(out, overwrite, file, images or images_beside(file))  # before a large file is looked through
    rows = _open(terminal, file, split, images)
    try:
        with terminal.progress("convert") as progress:
            done = run(rows, out, overwrite, progress)
    except KeyboardInterrupt:
        terminal.say("stopped; the same command goes on from here")
        raise
    files = ", ".join(map(str, done.files))
    resumed = f", the first {done.resumed_at} of them by an earlier run" if done.resumed_at else ""
    terminal.say(f"{files}: {plural(done.rows, 'row')}{resumed}")
    if json:
        terminal.json({"files": [str(path) for path in done.files], "rows": done.rows, "resumed_at": done.resumed_at})


@data.command(cls=Command)
def split(
    file: File,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for train and held_out.")],
    held_out: Annotated[float, typer.Option("--held-out", help="A share below 1, or a number of rows.")] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Decides which rows.")] = 42,
    split: options.Split = None,
    images: options.Images = None,
    overwrite: Overwrite = False,
    json: options.Json = False,
) -> None:
    """Hold out rows by picture: no picture is on both sides."""
    from minimind_v.core.curate.split import split as run

    if not 0 < held_out < math.inf:
        raise typer.BadParameter("must be above 0, and finite", param_hint="--held-out")
    if held_out > 1 and not held_out.is_integer():
        raise typer.BadParameter("is a share below 1 or a whole number of rows", param_hint="--held-out")
    terminal = Terminal()
    rows = _open(terminal, file, split, images)
    with terminal.progress("split") as progress:
        done = run(rows, out, held_out, seed, overwrite, progress)
    where = f"; the pictures of both are in {rows.pictures} (--images)" if rows.pictures else ""
    terminal.say(
        f"{done.train}: {plural(done.train_rows, 'row')}; {done.held_out}: {plural(done.held_out_rows, 'row')}{where}"
    )
    if json:
        terminal.json({
            "train": str(done.train), "held_out": str(done.held_out), "train_rows": done.train_rows,
            "held_out_rows": done.held_out_rows, "groups": done.groups,
        })  # fmt: skip


def _open(terminal: Terminal, file: Path, split: str | None, images: Path | None) -> RowStore:
    """The rows, with the pictures that were named or are beside them."""
    from minimind_v.core.config.load import images_beside
    from minimind_v.core.rows.pictures import find_pictures
    from minimind_v.core.rows.stores import find_rows, open_rows

    images = images or images_beside(file)
    open_all(lambda: find_rows(file), lambda: find_pictures(images))
    return open_rows(file, images, split, terminal.say)
