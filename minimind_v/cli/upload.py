"""`mmv upload`: an exported folder for everybody, on a hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal
from minimind_v.core.wording import plural


def upload(
    folder: Annotated[Path, typer.Argument(help="What `mmv convert --to hf` wrote.")],
    repo: Annotated[str, typer.Option("--repo", metavar="OWNER/NAME", help="Made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Only for you and whom you let in.")] = False,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Another hub. [default: HF_ENDPOINT, or huggingface.co]")
    ] = None,
    json: options.Json = False,
) -> None:
    """Upload an exported folder to a hub, model card included, as one commit. Needs a token (`hf auth login`)."""
    from minimind_v.core.export.publish import publish

    done = publish(folder, repo, private, endpoint)
    terminal = Terminal()
    if json:
        terminal.json(asdict(done))
    else:
        terminal.say(f"{done.url}: {plural(done.files, 'file')}, {done.bytes:,} bytes, commit {done.commit[:10]}")
