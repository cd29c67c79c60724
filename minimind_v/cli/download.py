"""`mmv download`: bring what the stages need, from Hugging Face or ModelScope."""

from __future__ import annotations

import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import BytesProgress, Terminal
from minimind_v.core.errors import UsageError

if TYPE_CHECKING:
    from minimind_v.core.hub.item import Item


class What(str, Enum):
    all = "all"
    clip = "clip"
    lm = "lm"
    tokenizer = "tokenizer"
    dataset = "dataset"
    weights = "weights"


class Hub(str, Enum):
    auto = "auto"
    hf = "hf"
    modelscope = "modelscope"


class Preset(str, Enum):
    small = "small"
    base = "base"
    moe = "moe"


class Split(str, Enum):
    pretrain = "pretrain"
    sft = "sft"


def download(
    what: Annotated[What, typer.Argument(help="What to bring.")] = What.all,
    hub: Annotated[Hub, typer.Option("--hub", help="Where from; auto: hf, and where it fails modelscope.")] = Hub.auto,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="A mirror. [default: HF_ENDPOINT, or the hub's own]")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit. [default: the pinned one]")
    ] = None,
    preset: Annotated[Preset, typer.Option("--preset", help="Size of the language model.")] = Preset.small,
    root: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Where model/, dataset/ and out/ are laid out.")
    ] = Path(),
    split: Annotated[Split | None, typer.Option("--split", help="Only this half of the dataset.")] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, metavar="N", help="Only the first N rows, to dataset/sample.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would come, from where, how big.")] = False,
    json: options.Json = False,
) -> None:
    """Bring the vision model, the tokenizer, the language model, the data or trained weights.

    What is here and right is left alone; what was interrupted goes on; every file is checked before it gets its name.
    """
    from minimind_v.core.config.presets import PRESETS, weights_name
    from minimind_v.core.hub.fetch import HUBS, Download
    from minimind_v.core.hub.sources import SPLITS
    from minimind_v.core.hub.wanted import download_parts

    if (sample or split) and what not in (What.all, What.dataset):
        raise UsageError(f"--{'sample' if sample else 'split'} is for the dataset, not for {what.value}")
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"--endpoint {endpoint}: an address begins with https:// or http://")
    terminal = Terminal()
    file_of = partial(weights_name, config=PRESETS[preset.value])
    parts = download_parts(what.value, root, preset.value, file_of, (split.value,) if split else SPLITS, sample)
    hubs = HUBS if hub is Hub.auto else (hub.value,)
    with BytesProgress(terminal) as progress:
        work = Download(parts, hubs, progress, endpoint, revision)
        try:
            items = work.run(dry_run)
        except KeyboardInterrupt:
            terminal.say("stopped; the same command goes on from here")
            sys.exit(130)
    if json:
        terminal.json(_report(items, work.transferred))
    else:
        _show(terminal, items)


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
        coming = sum(max((item.size or 0) - item.staged, 0) for item in items if item.action == "would fetch")
        terminal.result(f"{coming / 1e6:,.1f} MB to come")
