"""`mmv data`: check, convert and split rows."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import data_view, options
from minimind_v.cli.command import Debug, Group, Quiet, Verbose, advanced, register, set_verbosity
from minimind_v.cli.data_view import ROW_OPTIONS, File
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import open_all
from minimind_v.core.wording import plural

if TYPE_CHECKING:
    from minimind_v.core.curate.check import Report
    from minimind_v.core.rows.row import RowStore

data = typer.Typer(cls=Group, no_args_is_help=True)


@data.callback()
def root(verbose: Verbose = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Inspect and convert rows: check, stats, preview, convert, split."""
    set_verbosity(verbose, quiet, debug)


def check(
    file: File,
    settings: dict[str, Any],
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens per row. [default: that of the stage]")] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out rows: report images that both have.")
    ] = None,
    workers: Annotated[int, advanced(min=1, help="Processes.")] = os.cpu_count() or 1,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a copy (.jsonl or .parquet) of the good rows.")
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Find every problem of every row. The exit code is 1 if training would refuse the rows."""
    from minimind_v.core.config.load import images_beside
    from minimind_v.core.curate import check as checking
    from minimind_v.core.curate.convert import find_target
    from minimind_v.core.data.dataset import RowDataset
    from minimind_v.core.machine import check_workers
    from minimind_v.core.rows.splits import SCORE
    from minimind_v.core.rows.stores import open_rows

    check_workers(workers)
    if fix:
        find_target(fix, overwrite, file, settings["images"] or images_beside(file), against)
    terminal = Terminal()
    recipe, rows, encoder, spec = data_view.open_data(terminal, file, settings, against)
    length = max_length or recipe.data.max_length
    dataset = RowDataset.for_spec(rows, encoder, spec, length)
    held_out = None
    if against:
        held_out = open_rows(against, images_beside(against) or settings["images"], say=terminal.say, order=SCORE)
    with terminal.progress("check") as progress:
        report = checking.check(dataset, workers, held_out, progress)
    summary = checking.summary(report, recipe.data.bad_rows)
    if fix:
        summary["fixed"] = _fix(terminal, report, rows, fix, overwrite)
    if json:
        terminal.json(summary, problems=map(checking.as_json, report.problems()))
    else:
        _show(terminal, summary, file)
    if not summary["ok"] and fix:
        terminal.say(f"training would refuse {file} ({summary['refusal']}); it accepts {fix}")
    elif not summary["ok"]:
        clean = " — write a clean copy with --fix OUT.jsonl" if summary["usable"] else ""
        terminal.fail(f"training would refuse these rows: {summary['refusal']}{clean}")
        raise typer.Exit(1)


def _fix(terminal: Terminal, report: Report, rows: RowStore, out: Path, overwrite: bool) -> dict[str, Any]:
    import numpy as np

    from minimind_v.core.curate.convert import convert as run
    from minimind_v.core.errors import DataError
    from minimind_v.core.rows.subset import SampledRows

    kept = np.flatnonzero(report.whole & ~report.repeated)
    if not len(kept):
        raise DataError(f"{rows.path}: every row has a problem, so there is nothing to write")
    with terminal.progress("fix") as progress:
        done = run(SampledRows(rows, kept), out, overwrite, progress)
    broken = report.rows - int(report.whole.sum())
    repeated = report.rows - broken - done.rows
    terminal.say(
        f"{out}: {plural(done.rows, 'row')}; {broken} broken and {repeated} repeated or held-out rows left out"
    )
    return {"files": [str(path) for path in done.files], "rows": done.rows, "left_out": broken + repeated}


def _show(terminal: Terminal, summary: dict[str, Any], file: Path) -> None:
    for kind, problem in summary["kinds"].items():
        terminal.result(
            f"{kind:<18}{problem['count']:>8}  training {problem['training']}: {', '.join(problem['first'])}"
        )
        terminal.result(f"{'':<28}{problem['message']}")
    for note in (summary["text_rows"], *summary["notes"].values()):
        if note["count"]:
            terminal.result(f"information: {note['message']}: {', '.join(note['first'])}")
    terminal.result(f"{file}: {plural(summary['rows'], 'row')}, {summary['usable']} of them usable for training")


def convert(
    file: File,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="NAME.parquet, or NAME.jsonl with NAME_images.zip.")],
    split: options.Split = None,
    images: options.Images = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Convert rows between JSONL and parquet; image bytes stay the same. If interrupted, run it again: it resumes."""
    from minimind_v.core.config.load import images_beside
    from minimind_v.core.curate.convert import convert as run
    from minimind_v.core.curate.convert import find_target

    terminal = Terminal()
    find_target(out, overwrite, file, images or images_beside(file))  # before a large file is indexed
    rows = _open(terminal, file, split, images)
    try:
        with terminal.progress("convert") as progress:
            done = run(rows, out, overwrite, progress)
    except KeyboardInterrupt:
        terminal.say("stopped — run the same command again to resume")
        raise
    files = ", ".join(map(str, done.files))
    resumed = f", {done.resumed_at} of them from the interrupted run" if done.resumed_at else ""
    terminal.say(f"{files}: {plural(done.rows, 'row')}{resumed}")
    if json:
        terminal.json({"files": [str(path) for path in done.files], "rows": done.rows, "resumed_at": done.resumed_at})


def split(
    file: File,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files train and held_out.")],
    held_out: Annotated[
        float, typer.Option("--held-out", help="Held-out part: a share below 1, or a number of rows.")
    ] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of rows.")] = 42,
    split: options.Split = None,
    images: options.Images = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Split off held-out rows by image: no image is in both files."""
    from minimind_v.core.curate.split import split as run

    if not 0 < held_out < math.inf:
        raise typer.BadParameter("must be above 0, and finite", param_hint="--held-out")
    if held_out > 1 and not held_out.is_integer():
        raise typer.BadParameter("must be a share below 1 or a whole number of rows", param_hint="--held-out")
    terminal = Terminal()
    rows = _open(terminal, file, split, images)
    with terminal.progress("split") as progress:
        done = run(rows, out, held_out, seed, overwrite, progress.begin)
    where = f"; the images of both are in {rows.pictures} (--images)" if rows.pictures else ""
    terminal.say(
        f"{done.train}: {plural(done.train_rows, 'row')}; {done.held_out}: {plural(done.held_out_rows, 'row')}{where}"
    )
    if json:
        terminal.json({
            "train": str(done.train), "held_out": str(done.held_out), "train_rows": done.train_rows,
            "held_out_rows": done.held_out_rows, "groups": done.groups,
        })  # fmt: skip


def _open(terminal: Terminal, file: Path, split: str | None, images: Path | None) -> RowStore:
    """The rows, with the images that --images names or that lie beside them."""
    from minimind_v.core.config.load import images_beside
    from minimind_v.core.rows.pictures import find_pictures
    from minimind_v.core.rows.stores import find_rows, open_rows

    images = images or images_beside(file)
    open_all(lambda: find_rows(file), lambda: find_pictures(images))
    return open_rows(file, images, split, terminal.say)


register(data, "check", check, table=ROW_OPTIONS)
register(data, "stats", data_view.stats, table=ROW_OPTIONS)
register(data, "preview", data_view.preview, table=ROW_OPTIONS)
register(data, "convert", convert)
register(data, "split", split)
