"""Checks of output paths: a command never overwrites its inputs, nor another file without --overwrite."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from minimind_v.core.errors import UsageError
from minimind_v.core.files import read_notes


def keep_inputs(outputs: Iterable[Path], inputs: Iterable[Path | None]) -> None:
    """Raises UsageError if an output is an input, under any name or link."""
    read = [path for path in inputs if path]
    for output in outputs:
        if any(_same(output, path) for path in read):
            raise UsageError(f"{output} is an input of this command, so it cannot be its output — name another file")


def _same(output: Path, path: Path) -> bool:
    if output.exists() and path.exists():
        return output.samefile(path)
    return output.resolve() == path.resolve()


def check_folder(path: Path, option: str = "--out") -> None:
    """Raises UsageError where a folder is to be written, and a file has its name or that of a folder above it."""
    if file := next((folder for folder in (path, *path.parents) if os.path.isfile(folder)), None):
        raise UsageError(f"{option} {path}: {file} is a file, not a folder — name another folder")


def keep_set(outputs: Iterable[Path], rows: Path) -> None:
    """Raises UsageError if an output lies in a folder of rows, where all files together are one set."""
    for output in outputs:
        if rows.is_dir() and rows.resolve() in output.resolve().parents:
            raise UsageError(f"{output} would become a part of the rows in {rows} — name a file outside that folder")


def keep_description(weights: Path) -> None:
    """Raises UsageError if the JSON file beside the weights is not a description of weights."""
    beside = weights.with_suffix(".json")
    if beside.exists() and not isinstance(read_notes(beside).get("model"), dict):
        raise UsageError(
            f"{beside} does not describe weights, and the description of {weights.name} would overwrite it — "
            "move it, or name another --out"
        )


def check_weights(target: Path, source: Path, ending: str, overwrite: bool) -> None:
    """Raises UsageError if `source` cannot be written as `target`, a file with this ending."""
    if target.suffix != ending:
        raise UsageError(f"--out {target} must end with {ending}")
    if target.is_dir():
        raise UsageError(f"--out {target} is a folder — name a file")
    if _same(target, source):
        raise UsageError(f"{target} is the source — name another --out")
    for written in (target, target.with_suffix(".json")) if ending == ".pth" else (target,):
        if written.exists() and not overwrite:
            raise UsageError(f"{written} already exists — add --overwrite, or name another --out")
    if ending == ".pth":
        keep_description(target)
