"""The commands of `mmv`, in the groups that its help shows. Each imports torch only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from minimind_v.cli import (
    bench,
    chat,
    compare,
    convert,
    data,
    demo,
    doctor,
    download,
    evaluate,
    info,
    look,
    plan,
    report,
    runs,
    serve,
    train,
    upload,
)
from minimind_v.cli.command import (
    DATA,
    MACHINE,
    PIPELINE,
    RUNS,
    USE,
    Debug,
    Group,
    Quiet,
    Verbose,
    output,
    register,
    set_verbosity,
)
from minimind_v.cli.run_options import RUN_OPTIONS
from minimind_v.cli.terminal import run_app
from minimind_v.core.extensions import load_extensions
from minimind_v.core.version import __version__

app = typer.Typer(
    name="mmv",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`mmv COMMAND --help` shows the options of a command.",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"mmv {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        output("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train, understand and use a tiny vision-language model."""
    load_extensions()
    set_verbosity(verbose, quiet, debug)


register(app, "download", download.download, PIPELINE)
register(app, "train", train.train, PIPELINE, table=RUN_OPTIONS)
register(app, "eval", evaluate.evaluate, PIPELINE)
register(app, "chat", chat.chat, PIPELINE, chat.ChatCommand)
register(app, "convert", convert.convert, PIPELINE)
register(app, "look", look.look, USE, look.LookCommand)
register(app, "serve", serve.serve, USE, serve.ServeCommand)
register(app, "web", serve.web, USE, serve.ServeCommand)
app.add_typer(data.data, name="data", rich_help_panel=DATA)
register(app, "plan", plan.plan, RUNS, table=RUN_OPTIONS)
register(app, "runs", runs.runs, RUNS)
register(app, "report", report.report, RUNS)
register(app, "compare", compare.compare, RUNS, compare.CompareCommand)
register(app, "info", info.info, RUNS)
register(app, "upload", upload.upload, RUNS)
register(app, "demo", demo.demo, MACHINE)
register(app, "doctor", doctor.doctor, MACHINE)
register(app, "bench", bench.bench, MACHINE)


def main() -> None:
    """Run the command line."""
    run_app(app)
