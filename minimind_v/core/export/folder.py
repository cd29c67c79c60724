"""Write an export, whole and proven, or not at all: write beside, verify, then rename."""

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
from minimind_v.core.formats.inventory import MANIFEST
from minimind_v.core.formats.request import ExportFacts, ExportRequest
from minimind_v.core.outputs import check_folder, check_weights
from minimind_v.core.version import __version__


def export(request: ExportRequest, to: str, out: Path, check: bool = True, overwrite: bool = False) -> Report:
    """Write the model of a request as `out` in the format `to` of TARGETS, and verify it unless `check` is false.

    Raises UsageError where `out` may not be replaced, MissingInput or WeightsError where the source is invalid,
    RunError where `out` cannot be written or differs. An error leaves no partial folder, and keeps the old one.
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
        facts, report = target.write(request, staging, check)
        _refuse_difference(request, out, report)
        manifest = _describe(request, to, facts, report)
        manifest["files"] = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        write_text(staging / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        _sync(staging)
        _refuse_to_replace(request, out, overwrite)  # another run may have written it meanwhile
        _rename(staging, out)
    return report


def _refuse_difference(request: ExportRequest, out: Path, report: Report) -> None:
    if report.wrong:
        findings = "; ".join(f"{name}: {report.findings[name]}" for name in report.wrong)
        raise RunError(f"{out}: not written, because it differs from {request.model} ({findings})")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an exported folder; None for any other folder."""
    manifest = read_notes(folder / MANIFEST)
    return manifest if isinstance(manifest.get("files"), dict) else None


def _refuse_to_replace(request: ExportRequest, out: Path, overwrite: bool) -> None:
    """Raises UsageError unless `out` is absent or empty or, with `overwrite`, an export without other files."""
    sources = [path.resolve() for path in (request.model, request.vision_model, request.tokenizer) if path]
    if any(out == source or out in source.parents for source in sources):
        raise UsageError(f"--out {out} contains the source — name another --out")
    check_folder(out)
    if not out.exists():
        return
    home = Path(os.path.expanduser("~"))  # unlike Path.home, this works without a home
    if out == home or out == Path.cwd() or out in Path.cwd().parents:
        raise UsageError(f"--out {out} is not usable as an output folder — name a new folder")
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return
    manifest = read_manifest(out)
    if manifest is None:
        raise UsageError(f"{out} already exists and was not written by `mmv convert` ({names[0]}) — name another --out")
    if not overwrite:
        raise UsageError(f"{out} exists — add --overwrite, or name another --out")
    if strange := [name for name in names if name not in manifest["files"] and name != MANIFEST]:
        raise UsageError(
            f"{out / strange[0]} was not written by `mmv convert` and would be lost — move it, or name another --out"
        )


def _describe(request: ExportRequest, to: str, facts: ExportFacts, report: Report) -> dict[str, Any]:
    """The manifest, without paths, since folders move."""
    source: dict[str, Any] = {"name": request.model.name}
    if request.model.is_file():
        with request.model.open("rb") as file:
            source["sha256"] = file_digest(file, "sha256").hexdigest()
    return {
        "made_by": f"mmv {__version__}",
        "kind": to,
        "source": source,
        "stage": facts.stage,
        "preset": facts.preset,
        "dtype": request.dtype,
        "quantize": request.quantize,
        "verified": report.findings or None,
    }


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, removed afterwards unless it was renamed; so are the parents made for it.

    First remove what a killed process left. Raises RunError where another process is writing `out`.
    """
    if sweep(out, patience=1.0):
        raise RunError(f"{out}: another process is writing it — wait until it ends, or name another --out")
    new_parents = [parent for parent in out.parents if not parent.exists()]
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
        with contextlib.suppress(OSError):  # not empty: it contains the export
            for parent in new_parents:
                parent.rmdir()


def _sync(folder: Path) -> None:
    """Flush all files to the disk, with usual permissions: some libraries write files only for their owner."""
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
