"""`mmv train`: one loop, two recipes."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.live import TrainView
from minimind_v.cli.terminal import Terminal, command_line
from minimind_v.core.config.freeze import FREEZE_POLICIES
from minimind_v.core.config.schema import DTYPES, FEATURES, TRACKERS
from minimind_v.core.errors import RunError, UsageError
from minimind_v.core.wording import plural

if TYPE_CHECKING:
    from minimind_v.core.config.load import Resolved
    from minimind_v.core.config.schema import RunConfig
    from minimind_v.core.train.launch import Launch
    from minimind_v.core.train.run import Summary


NOT_CONFIG = {
    "stage",
    "planned",
    "price_per_hour",
    "json",
    "config",
    "resume",
    "allow",
    "overwrite",
    "set_",
    "print_config",
    "nnodes",
    "node_rank",
    "rdzv_endpoint",
    "max_restarts",
}  # all other options are configuration keys


class Stage(str, Enum):
    """The two recipes, and the look ahead."""

    pretrain = "pretrain"
    sft = "sft"
    plan = "plan"


def _rows(text: str) -> int | str:
    """What --batch-size says."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number of rows nor `auto`") from None


def train(
    stage: Annotated[
        Stage,
        typer.Argument(
            help="pretrain: captions teach the projector. sft: conversations teach it all. "
            "plan: what the stage named behind it will take."
        ),
    ],
    planned: Annotated[Stage | None, typer.Argument(metavar="[STAGE]", help="With plan: pretrain or sft.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="YAML", help="Keys as --print-config shows them.")] = None,
    preset: Annotated[str | None, typer.Option(help="small, base, moe or demo. [default: small]")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="small-data, with sft: learn up to a few hundred rows of one's own, and measure what that costs. "
            "[default: the stage's own]",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Rows: JSONL, JSON, CSV, parquet or tar, or a folder of such files (docs/data.md)."
        ),
    ] = None,
    split: options.Split = None,
    images: options.Images = None,
    vision_model: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the CLIP vision model.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of tokenizer.json.")] = None,
    init: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights to start from; `none` for random ones.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where weights and metrics go.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Times that every row is seen.")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            parser=_rows,
            help="Rows per micro-batch and process; auto: as many of an update's rows as there is memory for.",
        ),
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Micro-batches per update.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate: falls from 1.1 × this to 0.1 × this.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per row, pictures included.")] = None,
    freeze: Annotated[str | None, typer.Option(metavar="POLICY", help=", ".join(FREEZE_POLICIES))] = None,
    max_steps: Annotated[int | None, typer.Option(help="Updates to stop after; 0 for all.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Updates between saves; 0 for only at the end.")] = None,
    save_minutes: Annotated[
        float | None, typer.Option(help="Minutes after which to save as well; 0 for never by time.")
    ] = None,
    log_every: Annotated[int | None, typer.Option(help="Updates between log lines.")] = None,
    val_every: Annotated[
        int | None, typer.Option(help="Updates between looks at rows held out by picture; 0 for none.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides the order of rows and all fresh weights.")] = None,
    dtype: Annotated[str | None, typer.Option(help=", ".join(DTYPES))] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="The same bits from the same run on a GPU too; slower.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(metavar="CHOICE", help=f"Remember what CLIP sees: {', '.join(FEATURES)}.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that prepare batches, for each GPU.")] = None,
    track: Annotated[str | None, typer.Option(metavar="TRACKER", help=", ".join(TRACKERS))] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of this machine; with --device cpu, processes.")] = None,
    nnodes: Annotated[int, typer.Option(help="Machines, each with --gpus of its own.")] = 1,
    node_rank: Annotated[int | None, typer.Option(help="Which of the machines this is, from 0.")] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the machines meet: the first one's address.")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(help="Times that a lost process makes all go on again from the last state.")
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, bit for bit; start it if there is none.")
    ] = False,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", metavar="KEY", help="With --resume: what may differ from before.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the weights of an earlier run.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any configuration key.")
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="With plan: what an hour here costs.")] = None,
    json: Annotated[bool, typer.Option("--json", help="With plan: print one JSON object and nothing else.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every setting, and who set it; exit.")
    ] = False,
) -> None:
    """Train a stage. Every default comes from the stage's recipe; --print-config shows them all."""
    options = {name: value for name, value in locals().items() if name not in NOT_CONFIG}
    from minimind_v.core.config.limits import check_machine
    from minimind_v.core.config.load import resolve, to_yaml
    from minimind_v.core.formats.inputs import find_inputs
    from minimind_v.core.train.launch import Launch

    if overwrite and resume:
        raise UsageError("--overwrite starts over, --resume goes on: give one of them")
    planning = stage is Stage.plan
    stage = (planned or Stage.pretrain) if planning else stage
    if stage is Stage.plan or (not planning and (planned or json or price_per_hour is not None)):
        raise typer.BadParameter("`mmv train plan [pretrain|sft]` looks ahead; --json and --price-per-hour are its own")
    resolved, terminal = resolve(stage.value, config, options, set_ or ()), Terminal()
    if not print_config:  # which may be for another machine
        check_machine(resolved.config)
    if print_config:
        built, sources = _fitted(resolved)
        terminal.result(to_yaml(built, sources), end="")
    elif planning:
        find_inputs(replace(resolved.config, init=None))  # it measures with random weights
        _look_ahead(terminal, _fitted(resolved)[0], price_per_hour, json)
    else:
        find_inputs(resolved.config)
        several = Launch(resolved.config.gpus, nnodes, node_rank, rdzv_endpoint, max_restarts)
        how = {"overwrite": overwrite, "resume": resume, "allowed": allow or (), "auto": resolved.auto}
        _run(terminal, resolved.config, several, **how)


def _fitted(resolved: Resolved) -> tuple[RunConfig, dict[str, str]]:
    """The configuration and its sources, with the batch size that is yet to be found."""
    if not resolved.auto:
        return resolved.config, resolved.sources
    from minimind_v.core.device import pick_device
    from minimind_v.core.train.batch_size import find_batch_size

    config, why = find_batch_size(resolved.config, pick_device(resolved.config.device))
    source = resolved.sources["data.batch_size"]
    return config, resolved.sources | {"data.batch_size": f"{source} auto: {why}", "accumulate": "follows"}


def _run(terminal: Terminal, config: RunConfig, several: Launch, **how: Any) -> None:
    """Train in this process, or start the processes that do; `how` is what the run is told besides."""
    from minimind_v.core.train.launch import hush, launch, mind_the_launcher

    mind_the_launcher()
    if several.needed:
        hush()

    from minimind_v.core.device import check_room
    from minimind_v.core.monitor.metrics import Silent
    from minimind_v.core.train.distributed import World
    from minimind_v.core.train.run import train as run

    world = World.find()
    if several.needed and not world.placed:
        check_room(config.device, several.processes)
        launch(several, sys.argv[1:], terminal.say)
        return
    if not world.leads:
        summary = run(config, Silent(), **how)
    else:
        with TrainView(terminal, config.stage) as view:
            summary = run(config, view, **how)
        _tell(terminal, summary)
    if summary.stopped_by:
        raise typer.Exit(128 + summary.stopped_by)


def _look_ahead(terminal: Terminal, config: RunConfig, price_per_hour: float | None, json: bool) -> None:
    from dataclasses import asdict

    from minimind_v.core.pages.run_report import shown
    from minimind_v.core.train.forecast import plan

    with terminal.progress("counting") as progress:
        found = asdict(plan(config, price_per_hour, progress, terminal.say))
    if json:
        terminal.json(found)
        return
    if found["warning"]:
        terminal.warn(found["warning"])
    names = ("updates", "samples", "tokens", "supervised_tokens", "seconds", "memory_bytes", "disk_bytes", "cost")
    rows = {name.removesuffix("_bytes").replace("_", " "): shown(name, found[name]) for name in names}
    terminal.table(
        {name: text for name, text in rows.items() if text != "–"}
        | {
            "learning rate": "from {:.2g} down to {:.2g}".format(*found["learning_rate"]),
            "how": found["how"],
        }
    )


def _where(summary: Summary) -> str:
    """Where a run's results are, as far as they are there."""
    if not summary.steps:
        return "nothing to save yet"
    results = {"weights": summary.weights, "curve": summary.metrics}
    return ", ".join(
        f"{name} in {path}" if path.is_file() else f"no {name}: {path} was removed" for name, path in results.items()
    )


def _tell(terminal: Terminal, summary: Summary) -> None:
    from minimind_v.core.rows.row import describe_notes, describe_text_rows

    how = f"stopped by {summary.stopped_by.name}" if summary.stopped_by else "done"
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary.broken_rows.items())
    broken = sum(summary.broken_rows.values())
    skipped = f"; {plural(broken, 'broken row')} skipped ({kinds})" if kinds else ""
    if summary.text_rows:
        terminal.say(describe_text_rows(summary.text_rows, summary.rows))
    for line in describe_notes(summary.notes, summary.rows):
        terminal.say(line)
    bad = f"; {plural(summary.bad_steps, 'update')} skipped, not finite" if summary.bad_steps else ""
    terminal.say(f"{how} after {plural(summary.steps, 'update')}{skipped}{bad}; {_where(summary)}")
    if summary.steps and not summary.weights.is_file():
        raise RunError(f"{summary.weights} is not there: somebody has removed it — start the run again")
    report = summary.metrics.with_name("report.html")
    if report.is_file():
        terminal.say(f"report: {report}")
    if summary.weights.is_file():
        terminal.say(f"ask it: {command_line('chat', '--model', summary.weights)}")
    if summary.stopped_by:
        words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
        terminal.say(f"go on with: {shlex.join(['mmv', *words, '--resume'])}")
