"""`manifest.json`: the exact inputs of a run, so that it can be repeated later."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import minimind_v
from minimind_v.core.config.load import as_settings
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.device import gpu_names
from minimind_v.core.files import read_notes, write_text
from minimind_v.core.monitor.fingerprint import INPUTS
from minimind_v.core.version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "pyarrow")


def write_manifest(path: Path, config: RunConfig, origin: Mapping[str, Any], done: int, processes: int = 1) -> None:
    """Write the manifest at the start of a run; where it is resumed (`done` steps), add a start to it.

    `origin` is that of fingerprint.origin_of, with the fingerprints of data and weights. Raises RunError.
    """
    begun = start(done, processes)
    starts = read_notes(path).get("starts") if done else None
    manifest = {
        "mmv": __version__,
        "stage": config.stage,
        "seed": config.seed,
        "config": as_settings(config),
        "fingerprints": {key: origin[key] for key in INPUTS},
        "code": origin["code"],
        "versions": versions(),
        "starts": [*(starts if isinstance(starts, list) else []), begun],
    }
    write_text(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def start(done: int, processes: int) -> dict[str, Any]:
    """When, how and where a run was started, or resumed after `done` steps."""
    name = Path(sys.argv[0]).name
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "after_updates": done,
        "command": shlex.join(["mmv" if name == "__main__.py" else name, *sys.argv[1:]]),
        "folder": str(Path.cwd()),
        "processes": processes,
        "machine": machine(),
        "versions": versions(),
        "git": git_state(Path(minimind_v.__file__).parent),
    }


def versions() -> dict[str, str]:
    """The versions of this package, of Python and of packages that decide numbers."""
    by_package = {"mmv": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            by_package[name] = version(name)
        except PackageNotFoundError:
            continue
    return by_package


def machine() -> dict[str, Any]:
    """The machine of the run."""
    return {
        "platform": platform.platform(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # A run on the CPU has not started CUDA, which would take memory of each GPU.
        "gpus": gpu_names() if torch.cuda.is_initialized() or torch.backends.mps.is_available() else [],
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the code and whether files differ from it; None where it does not come from a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # in the repository itself, not only below its folder
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": git("rev-parse", "HEAD"), "changed": [line[2:].strip() for line in changed]}
    except (OSError, subprocess.SubprocessError):
        return None
