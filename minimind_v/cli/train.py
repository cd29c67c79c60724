"""`mmv train`: run a stage of training."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli.command import advanced, output
from minimind_v.cli.live import TrainView
from minimind_v.cli.run_options import Config, Sets, Stage, resolve_run, with_batch_size
from minimind_v.cli.terminal import Terminal, command_line
from minimind_v.core.errors import RunError, UsageError
from minimind_v.core.wording import plural

if TYPE_CHECKING:
    from minimind_v.core.config.schema import RunConfig
    from minimind_v.core.train.launch import Launch
    from minimind_v.core.train.loop import Summary


def train(
    ctx: typer.Context,
    stage: Annotated[
        Stage,
        typer.Argument(
            metavar="STAGE", help="pretrain: captions train the projector. sft: conversations train the whole model."
        ),
    ],
    settings: dict[str, Any],
    config: Config = None,
    sets: Sets = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out exactly; start it if there is none.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over and replace an earlier run.")] = False,
    allow: Annotated[
        list[str] | None,
        advanced("--allow", metavar="KEY", help="With --resume: accept a change of this key."),
    ] = None,
    nnodes: Annotated[int, advanced(help="Number of machines; each uses --gpus GPUs.")] = 1,
    node_rank: Annotated[int | None, advanced(help="Number of this machine, from 0.")] = None,
    rdzv_endpoint: Annotated[
        str | None,
        advanced(metavar="HOST:PORT", help="Address of the first machine."),
    ] = None,
    max_restarts: Annotated[
        int,
        advanced(help="Number of times that all processes resume from the last state after one is lost."),
    ] = 0,
    print_config: Annotated[
        bool,
        output("--print-config", help="Print every setting and its source, then exit."),
    ] = False,
) -> None:
    """Train a stage. The stage's recipe gives every default; --print-config shows them."""
    from minimind_v.core.config.limits import check_machine
    from minimind_v.core.config.load import to_yaml
    from minimind_v.core.formats.inputs import find_inputs
    from minimind_v.core.train.launch import Launch

    if overwrite and resume:
        raise UsageError("--overwrite starts a new run and --resume resumes the old one — give one of them")
    resolved, terminal = resolve_run(ctx, stage, config, settings, sets), Terminal()
    if print_config:  # also of a configuration for another machine
        terminal.result(to_yaml(*with_batch_size(resolved)), end="")
        return
    for key, source in resolved.sources.items():
        if not source.startswith(("recipe ", "preset ")):
            terminal.detail(f"{key}: set by {source}")
    check_machine(resolved.config)
    find_inputs(resolved.config)
    launch = Launch(resolved.config.gpus, nnodes, node_rank, rdzv_endpoint, max_restarts)
    how = {"overwrite": overwrite, "resume": resume, "allowed": allow or (), "auto": resolved.auto}
    _run(terminal, resolved.config, launch, **how)


def _run(terminal: Terminal, config: RunConfig, several: Launch, **how: Any) -> None:
    """Train in this process, or start the processes that train."""
    from minimind_v.core.train.launch import hush, launch, obey_launcher

    obey_launcher()
    if several.needed:
        hush()

    from minimind_v.core.device import check_room
    from minimind_v.core.monitor.metrics import Listener
    from minimind_v.core.train.distributed import World
    from minimind_v.core.train.run import train as run

    world = World.find()
    if several.needed and not world.placed:
        check_room(config.device, several.processes)
        launch(several, command_line(), sys.argv[1:], terminal.say)
        return
    if not world.leads:
        summary = run(config, Listener(), **how)
    else:
        with TrainView(terminal, config.stage) as view:
            summary = run(config, view, **how)
        _show_summary(terminal, summary)
    if summary.stopped_by:
        raise typer.Exit(128 + summary.stopped_by)


def _show_summary(terminal: Terminal, summary: Summary) -> None:
    from minimind_v.core.rows.row import describe_notes, describe_text_rows

    if summary.text_rows:
        terminal.say(describe_text_rows(summary.text_rows, summary.rows))
    for line in describe_notes(summary.notes, summary.rows):
        terminal.say(line)
    end = f"stopped by {summary.stopped_by.name}" if summary.stopped_by else "done"
    terminal.say(f"{end} after {plural(summary.steps, 'step')}{_skipped(summary)}; {_results(summary)}")
    if summary.steps and not summary.weights.is_file():
        raise RunError(f"{summary.weights} was removed during the run — start the run again")
    best = summary.best_weights
    if best and best.is_file():
        terminal.say(f"best weights: {best}, {summary.best}")
    report = summary.metrics.with_name("report.html")
    if summary.steps and report.is_file():
        terminal.say(f"report: {report}")
    if summary.weights.is_file():
        terminal.say(f"chat with it: {command_line('chat', '--model', summary.weights)}")
    if best and best.is_file():
        terminal.say(f"or with the best: {command_line('chat', '--model', best)}")
    if summary.stopped_by:
        arguments = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
        terminal.say(f"resume with: {command_line(*arguments, '--resume')}")


def _skipped(summary: Summary) -> str:
    """The rows and steps that were skipped, as the end of a sentence."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary.broken_rows.items())
    rows = f"; {plural(sum(summary.broken_rows.values()), 'broken row')} skipped ({kinds})" if kinds else ""
    return rows + (f"; {plural(summary.bad_steps, 'step')} skipped, not finite" if summary.bad_steps else "")


def _results(summary: Summary) -> str:
    """The paths of a run's results that exist."""
    if not summary.steps:
        return "nothing saved yet" if summary.stopped_by else "no weights written"
    results = {"weights": summary.weights, "curve": summary.metrics}
    return ", ".join(
        f"{name} in {path}" if path.is_file() else f"no {name}: {path} was removed" for name, path in results.items()
    )
