"""The options of a training run, which `mmv train` and `mmv plan` share, and the configuration that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.command import ADVANCED, POLICIES, Table, advanced
from minimind_v.cli.options import ENVIRONMENT, complete
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schema import DTYPES, FEATURES, FREEZE_POLICIES, REDUCE_DTYPES, TRACKERS, VALIDATION

if TYPE_CHECKING:
    from minimind_v.core.config.load import Resolved
    from minimind_v.core.config.schema import RunConfig


class Stage(str, Enum):
    """The two stages of training."""

    pretrain = "pretrain"
    sft = "sft"


def _rows(text: str) -> int | str:
    """The value of --batch-size."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number of rows nor `auto`") from None


def _common(kind: Any, help: str, **more: Any) -> tuple[Any, None]:
    """An option that is a configuration key; where it is not given, the recipe decides."""
    return Annotated[kind | None, typer.Option(help=help, **more)], None


def _advanced(kind: Any, help: str, **more: Any) -> tuple[Any, None]:
    return _common(kind, help, rich_help_panel=ADVANCED, **more)


# Every option here is a key of the configuration.
RUN_OPTIONS: Table = {
    "data": _common(
        Path, "Rows: JSONL, JSON, CSV, parquet or tar, or a folder of such files (docs/data.md).",
        metavar="FILE", envvar=ENVIRONMENT["data"],
    ),
    "images": (options.Images, None),
    "out": _common(Path, "Folder of weights and metrics.", metavar="DIR", envvar=ENVIRONMENT["out"]),
    "preset": _common(
        str, f"Model size: {', '.join(PRESETS)}. [default: small]", metavar="NAME", autocompletion=complete(PRESETS)
    ),
    "init": _common(
        Path, "Weights to start from; `none` starts from random weights. [default: those of the stage before]",
        metavar="FILE",
    ),
    "epochs": _common(int, "Passes over all rows."),
    "batch_size": _common(
        str, "Rows per micro-batch and process. auto: the largest micro-batch that fits into memory.",
        metavar="N|auto", parser=_rows,
    ),
    "accumulate": _common(int, "Micro-batches per step."),
    "lr": _common(float, "Learning rate. It falls from 1.1 × this value (presets 3v: 1 ×) to 0.1 × this value."),
    "freeze": _common(
        str, f"Trainable weights: {POLICIES}.", metavar="POLICY", autocompletion=complete(FREEZE_POLICIES),
    ),
    "device": _common(str, "auto, cpu, cuda, cuda:1, mps …", metavar="NAME", envvar=ENVIRONMENT["device"]),
    "gpus": _common(int, "Number of GPUs on this machine; with --device cpu, number of processes."),
    "recipe": _advanced(
        str, "small-data, with sft: train on up to a few hundred rows of your own, and measure what the model forgets. "
        "[default: the stage's recipe]",
        metavar="NAME",
    ),
    "split": (options.Split, None),
    "vision_model": _advanced(
        Path, "Folder of the vision encoder.", metavar="DIR", envvar=ENVIRONMENT["vision_model"]
    ),
    "tokenizer": _advanced(Path, "Folder of tokenizer.json.", metavar="DIR", envvar=ENVIRONMENT["tokenizer"]),
    "max_length": _advanced(int, "Tokens per row, image tokens included."),
    "max_steps": _advanced(int, "Stop after this many steps; 0: train on all rows."),
    "save_every": _advanced(int, "Steps between two saved states; 0: save only at the end."),
    "save_minutes": _advanced(float, "Minutes between two saved states; 0: never save by time."),
    "log_every": _advanced(int, "Steps between two log lines."),
    "val_every": _advanced(int, "Steps between two validations on held-out rows; 0: no validation."),
    "eval_every": _advanced(
        int, "Steps between two evaluations by --eval-task: when does the model begin to use its images? 0: none."
    ),
    "eval_task": _advanced(str, "Task of the evaluations, as of `mmv eval --task`.", metavar="NAME|FILE"),
    "eval_data": _advanced(Path, "Questions of the evaluations.", metavar="FILE"),
    "eval_images": _advanced(Path, "Images of these questions.", metavar="DIR|ZIP|TAR"),
    "eval_limit": _advanced(int, "Questions of each evaluation, the same ones each time."),
    "best_by": _advanced(
        str, f"Keep the weights that are best by this metric of --eval-task. [default: {VALIDATION}, its loss]",
        metavar="METRIC",
    ),
    "seed": _advanced(int, "Seed of the order of rows and of new weights."),
    "dtype": _advanced(
        str, f"Type of the computation: {', '.join(DTYPES)}.", metavar="TYPE", autocompletion=complete(DTYPES)
    ),
    "reduce_dtype": _advanced(
        str, f"Type of the gradients that several processes exchange: {', '.join(REDUCE_DTYPES)}. bfloat16 halves the "
        "bytes, and rounds gradients.",
        metavar="TYPE", autocompletion=complete(REDUCE_DTYPES),
    ),
    "deterministic": (
        Annotated[
            bool | None,
            advanced(
                "--deterministic", help="Repeat the same run bit for bit on a GPU; slower."),
        ],
        None,
    ),
    "features": _advanced(
        str, f"Cache the features of the vision encoder on disk: {', '.join(FEATURES)}.", metavar="CHOICE",
        autocompletion=complete(FEATURES),
    ),
    "workers": _advanced(int, "Processes that prepare batches, per GPU."),
    "track": _advanced(
        str, f"Send metrics to a tracker: {', '.join(TRACKERS)}.", metavar="TRACKER",
        autocompletion=complete(TRACKERS),
    ),
}  # fmt: skip

Config = Annotated[
    Path | None,
    advanced(metavar="YAML", help="File of settings, in the form that --print-config prints."),
]
Sets = Annotated[
    list[str] | None,
    advanced("--set", metavar="KEY=VALUE", help="Set any configuration key."),
]


def resolve_run(
    ctx: typer.Context, stage: Stage, config: Path | None, settings: Mapping[str, Any], sets: Sequence[str] | None
) -> Resolved:
    """The configuration of a run. A file of settings outweighs the environment, and an option outweighs both."""
    from minimind_v.core.config.load import FLAG_KEYS, resolve
    from minimind_v.core.config.settings import read_settings

    origins = {name: ctx.get_parameter_source(name) for name in settings}
    variables = {
        FLAG_KEYS.get(name, name): name for name, origin in origins.items() if origin and origin.name == "ENVIRONMENT"
    }
    in_file = set(read_settings(config)) & set(variables) if config else set()
    given = {name: value for name, value in settings.items() if name not in {variables[key] for key in in_file}}
    resolved = resolve(stage.value, config, given, sets or ())
    from_variables = {
        key: ENVIRONMENT[name]
        for key, name in variables.items()
        if resolved.sources.get(key) == f"--{name.replace('_', '-')}"
    }
    return replace(resolved, sources=resolved.sources | from_variables)


def with_batch_size(resolved: Resolved) -> tuple[RunConfig, dict[str, str]]:
    """The configuration and its sources, with the batch size measured where it is `auto`."""
    if not resolved.auto:
        return resolved.config, resolved.sources
    from minimind_v.core.device import pick_device
    from minimind_v.core.train.batch_size import find_batch_size

    config, reason = find_batch_size(resolved.config, pick_device(resolved.config.device))
    source = resolved.sources["data.batch_size"]
    return config, resolved.sources | {"data.batch_size": f"{source} auto: {reason}", "accumulate": "follows"}
