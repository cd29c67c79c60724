"""A separate process that runs functions: its end frees its memory, and it loads only what it needs.

As a program, it imports the given modules, then for each call on stdin writes the result or the error to stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from typing import Any

from minimind_v.core.errors import MmvError, RunError
from minimind_v.core.extensions import load_extensions
from minimind_v.core.processes import KILLED, Parent

SETTINGS = {
    # transformers prints nothing, and reads only the given folders.
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # glibc then returns the memory of a deleted model: 50 MB less where a second one follows.
    "MALLOC_MMAP_THRESHOLD_": "1000000",
    # Threads sleep while they wait: beside other busy processes, spinning took 80 CPU seconds instead of 14.
    "OMP_WAIT_POLICY": "PASSIVE",
}  # fmt: skip
PARENT = "MMV_PARENT"  # environment variable with the id of the parent process


class Worker:
    """`with Worker("a.module") as worker`: the process imports the module while this one continues."""

    def __init__(self, *modules: str) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 — closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env=os.environ | SETTINGS | {PARENT: str(os.getpid())},
        )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the system waits for a dead disk in its name
            self.process.communicate(timeout=KILLED)
        self.errors.close()

    def call(self, function: str, *args: Any) -> Any:
        """Call `function` ("a.module:name") in the process and return its result.

        Raises its MmvError, or RunError with the last line on stderr of a process that fails otherwise.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump((function, args), self.process.stdin)
            self.process.stdin.flush()
            error, result = pickle.load(self.process.stdout)
        except (BrokenPipeError, EOFError):
            raise RunError(self._last_line()) from None
        if error is not None:
            raise error
        return result

    def _last_line(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"{lines[-1]:.300}" if lines else f"a process ended with exit code {code}"


def serve(modules: list[str]) -> None:
    """Answer calls until stdin or the parent process ends."""
    Parent(int(os.environ[PARENT])).end_with_it()
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print to stderr, so stdout has only answers
    load_extensions()
    for module in modules:
        importlib.import_module(module)
    while True:
        try:
            function, args = pickle.load(calls)
        except EOFError:
            return
        pickle.dump(_answer(function, args), answers)
        answers.flush()


def _answer(function: str, args: tuple[Any, ...]) -> tuple[MmvError | None, Any]:
    module, _, name = function.partition(":")
    try:
        return None, getattr(importlib.import_module(module), name)(*args)
    except MmvError as error:
        return error, None


if __name__ == "__main__":
    serve(sys.argv[1:])
