"""`mmv report`: a run on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, its weights, or an --out that holds one run.")] = Path(
        "out"
    ),
    json: options.Json = False,
) -> None:
    """Write report.html into a run's folder: curves, warnings, what it is made of. A run under way has one, too."""
    from minimind_v.core.pages.run_report import find_run, write_report

    terminal = Terminal()
    path = write_report(find_run(run), terminal.warn)
    terminal.json({"report": str(path)}) if json else terminal.result(str(path))
