"""`mmv report`: one page about a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal
from minimind_v.core.paths import OUT_DIR


def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            envvar=options.ENVIRONMENT["out"],
            help="A run's folder, its weights, its name in `mmv runs`, or an --out folder with one run.",
        ),
    ] = OUT_DIR,
    json: options.Json = False,
) -> None:
    """Write report.html into a run's folder: curves, warnings, configuration. The run may still be in progress."""
    from minimind_v.core.pages.run_report import find_run, write_report

    terminal = Terminal()
    path = write_report(find_run(run, options.folder("out", OUT_DIR)), terminal.warn)
    terminal.json({"report": str(path)}) if json else terminal.result(str(path))
