"""`mmv download`: download the inputs of the stages from Hugging Face or ModelScope."""

from __future__ import annotations

import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.command import advanced
from minimind_v.cli.run_options import Stage
from minimind_v.cli.terminal import BytesProgress, Terminal
from minimind_v.core.errors import UsageError, nearest
from minimind_v.core.hub.sources import BENCHMARKS, PUBLISHED, Benchmark
from minimind_v.core.paths import STANDARD_PRESET

if TYPE_CHECKING:
    from minimind_v.core.hub.wanted import Item


class What(str, Enum):
    """Groups of files."""

    all = "all"
    clip = "clip"
    lm = "lm"
    tokenizer = "tokenizer"
    dataset = "dataset"
    weights = "weights"


class Hub(str, Enum):
    """The hubs."""

    auto = "auto"
    hf = "hf"
    modelscope = "modelscope"


Endpoint = Annotated[
    str | None,
    advanced("--endpoint", metavar="URL", help="Address of a mirror. [default: HF_ENDPOINT, or the hub's own]"),
]
Revision = Annotated[
    str | None, advanced("--revision", metavar="NAME", help="Branch, tag or commit. [default: the pinned one]")
]
Preset = Annotated[
    str,
    typer.Option(
        metavar="NAME", help=f"Model size: {', '.join(PUBLISHED)}.", autocompletion=options.complete(PUBLISHED)
    ),
]
Root = Annotated[Path, typer.Option("--dir", metavar="DIR", help="Folder that gets model/, dataset/ and out/.")]
Sample = Annotated[
    int | None,
    typer.Option("--sample", min=1, metavar="N", help="Download only the first N rows, into dataset/sample."),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Download a benchmark for `mmv eval --task`, and nothing else: {', '.join(BENCHMARKS)}.",
        autocompletion=options.complete(tuple(BENCHMARKS)),
    ),
]


def download(
    what: Annotated[What, typer.Argument(metavar="WHAT", help="The files to download.")] = What.all,
    hub: Annotated[Hub, typer.Option("--hub", help="auto: hf, then modelscope if hf fails.")] = Hub.auto,
    endpoint: Endpoint = None,
    revision: Revision = None,
    preset: Preset = STANDARD_PRESET,
    root: Root = Path(),
    split: Annotated[Stage | None, typer.Option("--split", help="Download only this stage's data.")] = None,
    sample: Sample = None,
    task: Task = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List files, sources and sizes without downloading.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Download the vision model, the tokenizer, the language model, the data, trained weights or a benchmark.

    Complete files stay as they are. If interrupted, run it again: it resumes. Every file is verified.
    """
    from minimind_v.core.config.presets import PRESETS, weights_name
    from minimind_v.core.config.schema import one_of
    from minimind_v.core.hub.fetch import HUBS, Download
    from minimind_v.core.hub.sources import SPLITS
    from minimind_v.core.hub.wanted import benchmark_parts, download_parts
    from minimind_v.core.outputs import check_folder

    check_folder(root, "--dir")
    one_of("preset", preset, PUBLISHED)
    benchmark = None if task is None else _benchmark(task, what, hub, bool(sample or split))
    if (sample or split) and what not in (What.all, What.dataset):
        raise UsageError(f"--{'sample' if sample else 'split'} is only for `dataset` and `all`, not for `{what.value}`")
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"--endpoint {endpoint}: must begin with https:// or http://")
    terminal = Terminal()
    file_of = partial(weights_name, config=PRESETS[preset])
    hubs: tuple[str, ...] = HUBS if hub is Hub.auto else (hub.value,)
    if benchmark is None:
        groups = download_parts(what.value, root, preset, file_of, (split.value,) if split else SPLITS, sample)
    else:
        groups, hubs = benchmark_parts(benchmark, root), tuple(benchmark.source.hubs)
    with BytesProgress(terminal) as progress:
        download = Download(groups, hubs, progress, endpoint, revision)
        try:
            items = download.run(dry_run)
        except KeyboardInterrupt:
            terminal.say("stopped — run the same command again to resume")
            sys.exit(130)
    if json:
        terminal.json(_report(items, download.transferred))
    else:
        _show(terminal, items)
    if benchmark is not None and not dry_run:
        terminal.say(f"measure a model by it with `{benchmark.command(root)}`")


def _benchmark(name: str, what: What, hub: Hub, has_more: bool) -> Benchmark:
    """The benchmark of this name. Raises UsageError, also for options that it has no use for."""
    if name not in BENCHMARKS:
        raise UsageError(f"--task {name}: no such benchmark{nearest(name, BENCHMARKS)} — {', '.join(BENCHMARKS)}")
    if what is not What.all or has_more:
        raise UsageError("--task downloads a benchmark alone — leave out WHAT, --sample and --split")
    if hub is not Hub.auto and hub.value not in BENCHMARKS[name].source.hubs:
        raise UsageError(f"--hub {hub.value} has no benchmarks — use --hub hf")
    return BENCHMARKS[name]


def _report(items: list[Item], transferred: int) -> dict[str, Any]:
    files = [
        {
            "path": str(item.path),
            "bytes": item.size,
            "sha256": item.sha256,
            "action": item.action,
            "hub": item.hub,
            "repo": item.repo,
            "commit": item.commit,
            "remote": item.remote.path,
        }
        | ({"url": item.url} if item.url else {})
        for item in items
    ]
    return {
        "hub": "+".join(dict.fromkeys(item.hub for item in items)),
        "commit": {item.repo: item.commit for item in items},
        "files": files,
        "bytes": sum(item.size or 0 for item in items),
        "transferred": transferred,
    }


def _show(terminal: Terminal, items: list[Item]) -> None:
    for item in items:
        size = "first rows" if item.size is None else f"{item.size / 1e6:,.1f} MB"
        terminal.result(f"{item.action:<11}  {size:>12}  {item.path}  ({item.hub} {item.repo}@{item.commit[:12]})")
    if any(item.action == "would fetch" for item in items):
        remaining = sum(max((item.size or 0) - item.staged, 0) for item in items if item.action == "would fetch")
        terminal.result(f"{remaining / 1e6:,.1f} MB to download")
