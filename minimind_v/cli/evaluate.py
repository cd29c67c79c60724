"""`mmv eval`: score a model on held-out rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.command import advanced
from minimind_v.cli.options import complete
from minimind_v.cli.terminal import Terminal
from minimind_v.core.config.schema import DTYPES, one_of
from minimind_v.core.errors import MissingInput, UsageError, open_all, shorten
from minimind_v.core.paths import OUT_DIR

if TYPE_CHECKING:
    from minimind_v.core.config.schema import DataConfig
    from minimind_v.core.evaluate.by_task import ChosenTask
    from minimind_v.core.evaluate.run import Scores
    from minimind_v.core.formats.load import LoadedModel
    from minimind_v.core.rows.row import RowStore

FIRST = 200  # rows that are scored where no --data names others
MAX_LENGTH, BATCH_SIZE = 1536, 8  # of an evaluation without --task; a task has its own


Data = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help=f"Held-out rows: file or folder. [default: {FIRST} rows of the sft data]"),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="NAME|FILE",
        help="Measure by a task, with intervals: loss, vqa, yesno, choice, caption, or a .yaml file of your own.",
    ),
]
Watch = Annotated[
    Path | None,
    advanced(
        "--watch",
        metavar="RUN",
        help="With --task: measure a run that is training, by its folder or name, whenever it has saved weights.",
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Score only the first rows; with --task so many, drawn from each kind.")
]
Blind = Annotated[
    bool, typer.Option("--blind", help="Score again with a blank image: the difference is what images add.")
]
Split = Annotated[
    str | None, advanced(metavar="NAME", help="Split of a folder. [default: test, validation or held_out]")
]
Out = Annotated[
    Path | None,
    advanced(metavar="DIR", help="Folder of the predictions of --task. [default: one of its own in ./out/eval]"),
]
MaxLength = Annotated[
    int | None,
    advanced(min=1, help=f"Tokens per row, image tokens included; without --task only. [default: {MAX_LENGTH}]"),
]
Gpus = Annotated[int, advanced(min=1, help="Number of GPUs, with --task only; with --device cpu, number of processes.")]
BatchSize = Annotated[int | None, advanced(min=1, help=f"Rows per batch; without --task only. [default: {BATCH_SIZE}]")]
Dtype = Annotated[
    str,
    advanced(metavar="TYPE", help=f"Type of the computation: {', '.join(DTYPES)}.", autocompletion=complete(DTYPES)),
]


def evaluate(
    model: options.Model = None,
    data: Data = None,
    images: options.Images = None,
    task: TaskName = None,
    limit: Limit = None,
    blind: Blind = False,
    watch: Watch = None,
    split: Split = None,
    out: Out = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    gpus: Gpus = 1,
    vision_model: options.VisionOfModel = None,
    tokenizer: options.TokenizerOfModel = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Measure the loss on held-out rows and, where answers are short, the share of exactly right answers.

    With --task: its metrics with intervals, what the images add, and every answer in a file for `mmv compare`.
    """
    from minimind_v.core.config.load import images_beside

    one_of("dtype", dtype, DTYPES)
    terminal = Terminal()
    without = {"--blind": blind, "--max-length": max_length, "--batch-size": batch_size}
    chosen = _choose(task, without, {"--out": out is not None, "--gpus": gpus > 1})
    if chosen is not None:
        data, split = chosen.source(data, split)
    if watch is not None:
        how = (split, limit, dtype, vision_model, tokenizer, device)
        return _watch(watch, (model, out, gpus), chosen, data, images, how, json)
    if is_standard := data is None:
        standard = _standard_data(model)
        data, images, limit = standard.file, images or standard.images, limit or FIRST
    images = images or images_beside(data)
    rows, loaded = open_all(
        lambda: _open(terminal, chosen, data, images, split, (out, gpus, device)),
        lambda: options.load(model, vision_model, tokenizer, device, terminal.say),
    )
    note = ""
    if is_standard:
        note = f"scoring rows of {data}, which may be training data: name held-out rows with --data"
        terminal.warn(note)
    terminal.say(str(loaded.receipt))
    if chosen is not None:
        settings: dict[str, Any] = {"out": out, "root": options.folder("out", OUT_DIR), "limit": limit, "dtype": dtype}
        settings["note"], settings["models"] = note, _models(loaded, gpus, vision_model, tokenizer)
        by_task = _by_task(terminal, loaded, chosen, rows, settings)
        terminal.json(by_task) if json else _show_report(terminal, by_task)
        return
    settings = {"batch_size": batch_size or BATCH_SIZE, "limit": limit, "dtype": dtype}
    scores = _score(terminal, loaded, rows, max_length or MAX_LENGTH, blind, settings)
    _show_rows(terminal, scores["seeing"])
    report = _report(loaded.checkpoint.path, rows, scores) | ({"note": note} if note else {})
    shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in report.items()}
    terminal.json(report) if json else terminal.table(shown)


def _standard_data(model: Path | None) -> DataConfig:
    """The rows of --data, where it is not given; they may be in the folder of the model's project, such as the demo."""
    from minimind_v.core.config.load import build_config
    from minimind_v.core.hub.sources import latest_model, weights_at

    of_variable = os.environ.get(options.ENVIRONMENT["data"])
    standard = build_config("sft", options={"data": of_variable or None}).data
    if of_variable or standard.file.exists():
        return standard
    with suppress(MissingInput):
        weights = weights_at(model) if model else latest_model(lambda message: None, options.folder("out", OUT_DIR))
        if (file := weights.parent.parent / standard.file).exists():
            return build_config("sft", options={"data": file}).data
    return standard


def _choose(task: str | None, without: dict[str, int | None], with_task: dict[str, bool]) -> ChosenTask | None:
    """The task; `without` has the options that a task has no use for, `with_task` those that only a task uses.

    Raises UsageError before the model is loaded.
    """
    if task is None:
        for option in (option for option, is_given in with_task.items() if is_given):
            raise UsageError(f"{option} is for an evaluation with --task — name a task, or leave it out")
        return None
    if given := [option for option, value in without.items() if value]:
        verb = "are" if len(given) > 1 else "is"
        reason = ": a task always asks with a blank image, too" if given == ["--blind"] else ""
        them = "them" if len(given) > 1 else "it"
        raise UsageError(f"{', '.join(given)} {verb} for an evaluation without --task{reason} — leave {them} out")
    from minimind_v.core.evaluate.by_task import choose_task

    return choose_task(task)


def _watch(
    run: Path,
    others: tuple[Path | None, Path | None, int],
    chosen: ChosenTask | None,
    data: Path | None,
    images: Path | None,
    how: tuple[Any, ...],
    json: bool,
) -> None:
    """Measure a run that is training. Raises UsageError for --model, --out and --gpus, and without data."""
    from minimind_v.cli.watch import Measuring, watch_run
    from minimind_v.core.config.load import images_beside

    model, out, gpus = others
    of_variable = str(model) == os.environ.get(options.ENVIRONMENT["model"])
    unusable = {"--model": model is not None and not of_variable, "--out": out is not None, "--gpus": gpus > 1}
    if given := [option for option, value in unusable.items() if value]:
        raise UsageError(
            f"--watch measures the run's weights in one process, and writes there — leave out {' and '.join(given)}"
        )
    if chosen is None or data is None:
        raise UsageError("--watch needs --task and --data")
    watch_run(Terminal(), run, Measuring(chosen, data, images or images_beside(data), *how), json)


def _open(
    terminal: Terminal,
    chosen: ChosenTask | None,
    data: Path,
    images: Path | None,
    split: str | None,
    others: tuple[Path | None, int, str],
) -> RowStore:
    """The rows. Raises MissingInput, and UsageError also for the `others` of a task: --out, --gpus with --device."""
    from minimind_v.core.rows.pictures import find_pictures
    from minimind_v.core.rows.splits import SCORE
    from minimind_v.core.rows.stores import find_rows, open_rows

    open_all(lambda: find_rows(data), lambda: find_pictures(images))
    if chosen is None:
        return open_rows(data, images, split, terminal.say, SCORE)
    from minimind_v.core.device import check_room
    from minimind_v.core.evaluate.benchmarks import open_benchmark
    from minimind_v.core.evaluate.by_task import check_out
    from minimind_v.core.pages.eval_report import PAGE
    from minimind_v.core.pages.frame import check_page

    out, gpus, device = others
    check_out(out)
    if out is not None:
        check_page(out / PAGE)
    if gpus > 1:
        check_room(device, gpus)
    return open_benchmark(data, images, split, terminal.say, chosen.names)


def _models(
    loaded: LoadedModel, gpus: int, vision_model: Path | None, tokenizer: Path | None
) -> list[Callable[[], LoadedModel]]:
    """How each of several processes opens this model; empty for one."""
    from minimind_v.core.device import pick_device
    from minimind_v.core.formats.load import load

    if gpus == 1:
        return []
    kind = loaded.model.device.type
    devices = [f"{kind}:{number}" if kind == "cuda" else str(pick_device(kind, number)) for number in range(gpus)]
    return [partial(load, loaded.checkpoint.path, vision_model, tokenizer, name) for name in devices]


def _by_task(
    terminal: Terminal,
    loaded: LoadedModel,
    chosen: ChosenTask,
    rows: RowStore,
    how: dict[str, Any],
) -> dict[str, Any]:
    """Measure by a task and write its page; returns the report."""
    from minimind_v.core.evaluate.by_task import evaluate_task
    from minimind_v.core.pages.eval_report import write_eval_report

    with terminal.progress(f"eval {chosen.task.name}, answers") as progress:
        result = evaluate_task(loaded, chosen, rows, progress=progress, say=terminal.say, warn=terminal.warn, **how)
    return result.report | {"page": str(write_eval_report(result))}


def _show_report(terminal: Terminal, report: dict[str, Any]) -> None:
    """What the images add first, then the metrics, then the same for each kind of question."""
    from minimind_v.core.curate.token_text import visible
    from minimind_v.core.evaluate.results import most_frequent_kinds

    lines = {key: report[key] for key in ("model", "data", "task", "rows")}
    lines |= {"images": report["pictures"], "skipped": report["skipped"]}
    gains = {variant: gain for variant, gain in report["visual_gain"].items() if gain["value"] is not None}
    for variant, gain in gains.items():
        value = report["variants"][variant]
        lines[f"gain over {variant}"] = f"{_figure(gain)}{_chance(gain)}  ({variant} {value:.4f})"
    for metric in report["metrics"]:
        lines[metric["name"]] = f"{_figure(metric)}  (n {metric['n']}, images {metric['clusters']})"
    shown, more = most_frequent_kinds(kinds := report.get("kinds", {}))
    for kind in shown:
        metric = kinds[kind]
        gain = metric["visual_gain"]["blank"]
        lines[f"  {visible(shorten(kind, 40))}"] = _figure(metric) + (
            f"  gain over blank {_figure(gain)}" if gain["value"] is not None else ""
        )
    if more:
        lines["  and"] = f"{more:,} more in report.json"
    terminal.table(lines | {key: report[key] for key in ("predictions", "page")})


def _figure(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "no such answers"
    interval = "" if figure["ci_low"] is None else f"  [{figure['ci_low']:.4f}, {figure['ci_high']:.4f}]"
    return f"{figure['value']:.4f}{interval}"


def _chance(gain: dict[str, Any]) -> str:
    from minimind_v.core.wording import chance

    return "" if gain["p"] is None else f"  {chance(gain['p'])}"


def _score(
    terminal: Terminal, loaded: LoadedModel, rows: RowStore, max_length: int, blind: bool, how: dict[str, Any]
) -> dict[str, Scores]:
    """The scores with the rows' images and, if `blind`, with blank ones."""
    from minimind_v.core.evaluate.run import evaluate as score
    from minimind_v.core.evaluate.run import features_beside, held_out_dataset

    tokenizer, scores = loaded.tokenizer, {}
    cache = features_beside(loaded.model, loaded.checkpoint.path, how["dtype"], len(rows), terminal.say, terminal.warn)
    for name in ("seeing", "blind") if blind else ("seeing",):
        dataset = held_out_dataset(loaded.model, tokenizer, rows, max_length, blank=name == "blind")
        with terminal.progress(f"eval {name}, batches") as progress:
            scores[name] = score(
                loaded.model, dataset, tokenizer.pad_id, tokenizer.eos_id,
                progress=progress, memory=cache if name == "seeing" else None, **how,
            )  # fmt: skip
    return scores


def _show_rows(terminal: Terminal, scores: Scores) -> None:
    """Report skipped rows and rows that were read in another way than written."""
    from minimind_v.core.rows.row import describe_notes, describe_text_rows

    for row in scores.broken[:5]:
        terminal.warn(f"row skipped: {row}")
    if scores.text_rows:
        terminal.say(describe_text_rows(scores.text_rows, scores.rows))
    for line in describe_notes(scores.notes, scores.rows):
        terminal.say(line)


def _report(model: Path, rows: RowStore, scores: dict[str, Scores]) -> dict[str, Any]:
    seeing = scores["seeing"]
    report: dict[str, Any] = {
        "model": str(model), "data": str(rows.path), **({"split": rows.split} if rows.split else {}),
        "rows": seeing.rows, "broken_rows": len(seeing.broken), "text_rows": seeing.text_rows,
        "supervised_tokens": seeing.supervised_tokens, "short_answers": seeing.short_answers,
    }  # fmt: skip
    for name, score in scores.items():
        suffix = "" if name == "seeing" else "_blind"
        report |= {f"loss{suffix}": score.loss, f"perplexity{suffix}": score.perplexity}
        report |= {f"accuracy{suffix}": score.accuracy}
    return report | {"seconds": sum(score.seconds for score in scores.values())}
