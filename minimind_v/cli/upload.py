"""`mmv upload`: publish an exported folder on a hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.command import advanced
from minimind_v.cli.terminal import Terminal
from minimind_v.core.wording import plural


def upload(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that `mmv convert --to hf` wrote.")],
    repo: Annotated[
        str, typer.Option("--repo", metavar="OWNER/NAME", help="The repository; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    endpoint: Annotated[
        str | None,
        advanced(metavar="URL", help="Address of another hub. [default: HF_ENDPOINT, or huggingface.co]"),
    ] = None,
    json: options.Json = False,
) -> None:
    """Upload an exported folder and its model card in one commit. It needs a token (`hf auth login`)."""
    from minimind_v.core.export.publish import publish

    commit = publish(folder, repo, private, endpoint)
    terminal = Terminal()
    if json:
        terminal.json(asdict(commit))
    else:
        terminal.say(
            f"{commit.url}: {plural(commit.files, 'file')}, {commit.bytes:,} bytes, commit {commit.commit[:10]}"
        )
