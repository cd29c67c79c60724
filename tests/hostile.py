"""Files of strangers, each opened in a process that may take little: it ends in one line, soon."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MOST_SECONDS, MOST_BYTES, ADDRESSES = 10, 2_000_000_000, 8 << 30

_CODE = """
import json, resource, sys, time
from importlib import import_module
from pathlib import Path
module, name = sys.argv[1].split(":")
reader = import_module(module)
for part in name.split("."):
    reader = getattr(reader, part)
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
from minimind_v.core.errors import MmvError
for path in json.load(sys.stdin):
    begin = time.process_time()
    try:
        reader(Path(path))
        line = None
    except MmvError as error:
        line = str(error)
    # Not what getrusage says: Linux lets that begin with the memory of whoever started the process.
    taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
    print(json.dumps([path, line, time.process_time() - begin, taken]), flush=True)
"""


@dataclass(frozen=True)
class Opened:
    """What came of opening a file: the line of its refusal, or None where it was read."""

    line: str | None
    seconds: float  # of the processor: the machine may be busy
    bytes: int  # that the process has taken at most, up to now


def opened(reader: str, paths: Iterable[Path]) -> dict[Path, Opened]:
    """Open all files with `module:function`, one after another; whatever is no MmvError fails the test."""
    paths = list(paths)
    done = subprocess.run(
        [sys.executable, "-c", _CODE, reader, str(ADDRESSES)], input=json.dumps([str(path) for path in paths]),
        capture_output=True, text=True, timeout=60 + MOST_SECONDS * len(paths), check=False,
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines()]
    last = paths[len(results)] if len(results) < len(paths) else "none"
    assert not done.returncode, f"{last} ended the process: {done.stderr[-1500:]}"
    return {Path(path): Opened(line, seconds, taken) for path, line, seconds, taken in results}


def check_refused(reader: str, files: dict[Path, str]) -> None:
    """Each file is refused with the words that stand beside it, in one line, soon, and without taking memory."""
    for path, result in opened(reader, files).items():
        assert result.line is not None, f"{path} was read"
        assert files[path] in result.line, f"{path}: {result.line}"
        assert "\n" not in result.line
        assert result.seconds < MOST_SECONDS, f"{path} took {result.seconds:.1f} s"
        assert result.bytes < MOST_BYTES, f"{path} took {result.bytes / 1e9:.1f} GB"
