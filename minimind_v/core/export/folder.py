"""Write an export: a folder is whole and proven, or absent: written beside, verified, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from hashlib import file_digest
from pathlib import Path
from typing import Any

from minimind_v.core.errors import RunError, UsageError
from minimind_v.core.export.prove.report import Report
from minimind_v.core.export.targets import TARGETS
from minimind_v.core.files import in_use, only_writer, read_notes, sweep, umask, write_text
from minimind_v.core.formats.request import ExportFacts, ExportRequest
from minimind_v.core.outputs import check_weights
from minimind_v.core.version import __version__

MANIFEST = "mmv_export.json"  # what a folder is, where it came from, and which files are ours


def export(request: ExportRequest, to: str, out: Path, check: bool = True, overwrite: bool = False) -> Report:
    """Write what `request` names as `out`, one of TARGETS, proven the same unless `check` is false.

    Raises UsageError where `out` is in the way, MissingInput or WeightsError where the source is not good, RunError
    where `out` cannot be written or is not the same. Nothing of a folder is left behind then, and what was there stays.
    """
    target = TARGETS[to]
    if target.ending:
        check_weights(out, request.model, target.ending, overwrite)
        with only_writer(out):
            check_weights(out, request.model, target.ending, overwrite)  # another run may have written it meanwhile
            report = target.write(request, out, check)[1]
            if report.wrong:
                out.unlink(missing_ok=True)
            _refuse_difference(request, out, report)
        return report
    out = out.resolve()
    _refuse_to_replace(request, out, overwrite)
    with _beside(out) as staging:
        made, report = target.write(request, staging, check)
        _refuse_difference(request, out, report)
        manifest = _describe(request, to, made, report)
        manifest["files"] = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        write_text(staging / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        _sync(staging)
        _refuse_to_replace(request, out, overwrite)  # another run may have written it meanwhile
        _rename(staging, out)
    return report


def _refuse_difference(request: ExportRequest, out: Path, report: Report) -> None:
    if report.wrong:
        findings = "; ".join(f"{name}: {report.found[name]}" for name in report.wrong)
        raise RunError(f"{out}: not written, because it would not be the same as {request.model} ({findings})")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `export` noted in a folder that it wrote; None for any other folder."""
    manifest = read_notes(folder / MANIFEST)
    return manifest if isinstance(manifest.get("files"), dict) else None


def _refuse_to_replace(request: ExportRequest, out: Path, overwrite: bool) -> None:
    """Only an empty place, or, where that is asked for, a folder of which every file is ours."""
    sources = [path.resolve() for path in (request.model, request.vision_model, request.tokenizer) if path]
    if any(out == source or out in source.parents for source in sources):
        raise UsageError(f"--out {out} contains the source — name another --out")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out {out} is a file — name a folder with --out")
    home = Path(os.path.expanduser("~"))  # which, unlike Path.home, does without one
    if out == home or out == Path.cwd() or out in Path.cwd().parents:
        raise UsageError(f"--out {out} is not usable as an output folder — name a new folder")
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return
    manifest = read_manifest(out)
    if manifest is None:
        raise UsageError(f"{out} is there already, and not by `mmv convert` ({names[0]}) — name another --out")
    if not overwrite:
        raise UsageError(f"{out} exists — add --overwrite, or name another --out")
    if strange := [name for name in names if name not in manifest["files"] and name != MANIFEST]:
        raise UsageError(
            f"{out / strange[0]} was not written by `mmv convert` and would be lost — move it, or name another --out"
        )


def _describe(request: ExportRequest, to: str, made: ExportFacts, report: Report) -> dict[str, Any]:
    """What the manifest tells: no paths, since folders travel."""
    source: dict[str, Any] = {"name": request.model.name}
    if request.model.is_file():
        with request.model.open("rb") as file:
            source["sha256"] = file_digest(file, "sha256").hexdigest()
    return {
        "made_by": f"mmv {__version__}",
        "kind": to,
        "source": source,
        "stage": made.stage,
        "preset": made.preset,
        "dtype": request.dtype,
        "quantize": request.quantize,
        "verified": report.found or None,
    }


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which is gone afterwards unless it was renamed; so are parents made for it.

    What a process that was killed has left there goes first. Raises RunError where a living one is at it.
    """
    if sweep(out, patience=1.0):
        raise RunError(f"{out}: another process is writing it — wait until it ends, or name another --out")
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror or error})") from None
    try:
        staging.chmod(0o777 & ~umask())
        with in_use(staging):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: it holds what was written
            for parent in made:
                parent.rmdir()


def _sync(folder: Path) -> None:
    """Bring all to the disk; some libraries write files that only their owner may read."""
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask())
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _rename(staging: Path, out: Path) -> None:
    old = staging.with_suffix(".old")
    try:
        if out.exists():
            out.rename(old)
        staging.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise RunError(f"{out}: cannot be written ({error.strerror or error}); the old folder is unchanged") from None
    finally:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
