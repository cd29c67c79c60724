"""`mmv plan`: the time, memory, disk and cost of a training run, before it starts."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.run_options import Config, Sets, Stage, resolve_run, with_batch_size
from minimind_v.cli.terminal import Terminal
from minimind_v.core.config.recipes import NO_INIT


def plan(
    ctx: typer.Context,
    settings: dict[str, Any],
    stage: Annotated[Stage, typer.Argument(metavar="STAGE", help="The stage to plan.")] = Stage.pretrain,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Price of one hour on this machine.")] = None,
    config: Config = None,
    sets: Sets = None,
    json: options.Json = False,
) -> None:
    """Predict time, memory, disk and cost of a run: count its rows and measure a few steps. It takes the same options
    as `mmv train`.
    """
    from minimind_v.core.config.limits import check_machine
    from minimind_v.core.config.presets import name_preset
    from minimind_v.core.formats.inputs import find_init, find_inputs, weights_of_other_size

    resolved, terminal = resolve_run(ctx, stage, config, settings, sets), Terminal()
    run = resolved.config
    check_machine(run)
    if weights_of_other_size(run):
        find_init(run)  # raises, as training would
    find_inputs(replace(run, init=None))  # it measures with random weights
    absent = ", which do not exist yet" if run.init and run.init != NO_INIT and not run.init.exists() else ""
    sizes = f"preset {name_preset(run.model) or 'of its own sizes'}"
    terminal.say(f"{stage.value}, {sizes}: data {run.data.file}, weights {run.init or NO_INIT}{absent}")
    from minimind_v.core.pages.run_report import LABELS, shown
    from minimind_v.core.train.forecast import plan as forecast

    run, _ = with_batch_size(resolved)
    with terminal.progress("counting") as progress:
        report = asdict(forecast(run, price_per_hour, progress, terminal.say))
    if json:
        terminal.json(report)
        return
    if report["warning"]:
        terminal.warn(report["warning"])
    values = {label: shown(key, report[key]) for key, label in LABELS.items()}
    if report["cost"] is not None:
        values["cost"] += ", in the currency of --price-per-hour"
    terminal.table(
        {label: value for label, value in values.items() if value != "–"}
        | {"learning rate": "from {:.2g} down to {:.2g}".format(*report["learning_rate"]), "how": report["how"]}
    )
