"""Where a command may write: never over what it reads, and without being asked never over what somebody else made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from minimind_v.core.errors import UsageError
from minimind_v.core.files import read_notes


def keep_inputs(outputs: Iterable[Path], inputs: Iterable[Path | None]) -> None:
    """Raises UsageError where a file that is to be written is one that is read, by whatever name or link."""
    read = [path for path in inputs if path]
    for output in outputs:
        if any(_same(output, path) for path in read):
            raise UsageError(f"{output} is what is read, so it cannot be written — name another file")


def _same(output: Path, path: Path) -> bool:
    if output.exists() and path.exists():
        return output.samefile(path)
    return output.resolve() == path.resolve()


def keep_set(outputs: Iterable[Path], rows: Path) -> None:
    """Raises UsageError where a file is to be written into a folder of rows, all files of which are one set."""
    for output in outputs:
        if rows.is_dir() and rows.resolve() in output.resolve().parents:
            raise UsageError(f"{output} would become a part of the rows in {rows} — name a file outside of that folder")


def keep_description(weights: Path) -> None:
    """Raises UsageError where the place of the description of some weights holds another JSON, which would be lost."""
    beside = weights.with_suffix(".json")
    if beside.exists() and not isinstance(read_notes(beside).get("model"), dict):
        raise UsageError(
            f"{beside} does not describe weights, and would be written over by what describes {weights.name} — "
            "move it, or name another --out"
        )


def check_weights(target: Path, source: Path, ending: str, overwrite: bool) -> None:
    """Raises UsageError where `source` cannot be written as `target`, a file with this ending."""
    if target.suffix != ending:
        raise UsageError(f"--out {target} does not end with {ending}")
    if target.is_dir():
        raise UsageError(f"--out {target} is a folder, and a file is to be written — name another --out")
    if _same(target, source):
        raise UsageError(f"{target} is the source itself — name another --out")
    for written in (target, target.with_suffix(".json")) if ending == ".pth" else (target,):
        if written.exists() and not overwrite:
            raise UsageError(f"{written} is there already — add --overwrite, or name another --out")
    if ending == ".pth":
        keep_description(target)
