"""The `mmv` root. One file per command; each imports torch only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from minimind_v import __version__
from minimind_v.cli import bench, chat, convert, data, demo, doctor, download, evaluate, info, report, train, upload
from minimind_v.cli.command import Command
from minimind_v.cli.terminal import run_app
from minimind_v.core.extensions import load_extensions

app = typer.Typer(
    name="mmv",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmv {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train, understand and use a tiny vision-language model."""
    load_extensions()


app.command("download", cls=Command)(download.download)
app.add_typer(data.data, name="data")
app.command("train", cls=Command)(train.train)
app.command("report", cls=Command)(report.report)
app.command("eval", cls=Command)(evaluate.evaluate)
app.command("chat", cls=chat.ChatCommand)(chat.chat)
app.command("convert", cls=Command)(convert.convert)
app.command("upload", cls=Command)(upload.upload)
app.command("demo", cls=Command)(demo.demo)
app.command("bench", cls=Command)(bench.bench)
app.command("info", cls=Command)(info.info)
app.command("doctor", cls=Command)(doctor.doctor)


def main() -> None:
    """Run the command line."""
    run_app(app)
