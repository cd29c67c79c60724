"""Starts `mmv` in forks of a process that has imported torch already, which saves seconds of processor time for each.

A fork has a session, files, arguments and an environment of its own, and runs the installed script from its first line.
Where an environment has other settings that are read when Python or torch starts, the script is started afresh.
The processes of `mmv train --gpus` are forks as well, and children of the launcher as always; a second time, after one
was lost, it starts them afresh.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import io
import json
import locale
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MMV = Path(sys.executable).with_name("mmv")
# Nothing of the project, and nothing that starts threads or reads the environment when it is imported.
PRELOADED = ("torch", "torch.utils.data", "torch.distributed.nn.functional", "safetensors.torch", "tokenizers",
             "numpy.random", "PIL.Image", "yaml", "filelock", "typer", "pydantic.type_adapter",
             "pydantic.functional_validators", "rich.progress", "multiprocessing.connection")  # fmt: skip
READ_AT_START = ("PYTHON", "OMP_", "MKL_", "KMP_", "LC_", "LANG", "LD_", "TORCH",
                  "NPY_", "TYPER_", "_TYPER", "TERMINAL_")  # fmt: skip
SET_BY_TORCH = "TORCHINDUCTOR_CACHE_DIR"  # in each process that imports torch._dynamo
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # of the server, however a test changes its own
STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


class Fork:
    """A process that the server forked; with `pid`, `returncode`, `poll()` and `wait()` as `subprocess.Popen` has."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid, self.returncode, self._status = pid, None, status

    def poll(self) -> int | None:
        return self._ended_within(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._ended_within(timeout) is None:
            raise subprocess.TimeoutExpired("mmv", timeout or 0)
        return self.returncode

    def _ended_within(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            self.returncode = int(os.read(self._status, 32))
            os.close(self._status)
        return self.returncode


def start(
    args: list[str],
    files: list[int],
    env: dict[str, str],
    cwd: Path | None = None,
    terminal: bool = False,
    prepare: Callable[[], None] | None = None,
    afresh: bool = False,
) -> Fork | subprocess.Popen[bytes]:
    """Start `mmv` with three files, as the leader of a session; with `terminal`, that of the first file.

    `prepare`, a function of a module, is called in the new process before the command begins; in processes of `--gpus`
    as well. With `afresh` nothing is forked.
    """
    before = [prepare.__module__, prepare.__name__] if prepare else None
    order = {"args": args, "env": env, "cwd": str(cwd or Path.cwd()), "terminal": terminal, "prepare": before}
    if sys.platform == "linux" and _settings(env) == _settings(ENVIRONMENT) and not afresh:
        return _server().fork(order, files)
    command = [sys.executable, "-m", __name__, json.dumps(order)] if before else [str(MMV), *args]
    return subprocess.Popen(
        command, stdin=files[0], stdout=files[1], stderr=files[2], env=env, cwd=ROOT if before else order["cwd"],
        start_new_session=True, preexec_fn=lambda: _take_signals_and_terminal(terminal),
    )  # fmt: skip


def _settings(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(READ_AT_START) and name != SET_BY_TORCH}


class _Server:
    """The process that forks, and the socket that it takes orders from; it ends when the socket is closed."""

    def __init__(self) -> None:
        self.socket, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", __name__, str(end.fileno())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[end.fileno()], env=ENVIRONMENT, cwd=ROOT
        )
        end.close()
        atexit.register(self.close)

    def fork(self, order: dict[str, Any], files: list[int]) -> Fork:
        read, write = os.pipe()
        socket.send_fds(self.socket, [json.dumps(order).encode()], [*files, write])
        os.close(write)
        return Fork(int(self.socket.recv(32)), read)

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


@cache
def _server() -> _Server:
    return _Server()


# --- in the server ----------------------------------------------------------------------------------------------------


def _serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork for each order until the socket is closed; returns None then, and in each fork its order."""
    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["PIL.Image"].init()  # imports the module of every format
    gc.collect()
    gc.freeze()
    running: dict[int, tuple[int, int]] = {}  # by the file of a process: its id, and where its exit code is written
    while True:
        for file in select.select([channel.fileno(), *running], [], [])[0]:
            if file in running:
                pid, status = running.pop(file)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.close(file)
                os.write(status, str(code).encode())
                os.close(status)
                continue
            message, files, _, _ = socket.recv_fds(channel, 2**20, 4)
            if not message:
                return None
            pid = os.fork()
            if not pid:
                channel.close()
                for other, (_, status) in running.items():
                    os.close(other)
                    os.close(status)
                _take_files(files)
                return json.loads(message)
            channel.send(str(pid).encode())
            for number in files[:3]:
                os.close(number)
            running[os.pidfd_open(pid)] = (pid, files[3])


def _take_files(files: list[int]) -> None:
    """Make three files the standard ones of a session of its own, as Python opens them when it starts."""
    os.setsid()
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    for number, (name, mode) in enumerate(STREAMS):
        raw = os.fdopen(number, f"{mode}b", closefd=False)
        errors = "backslashreplace" if name == "stderr" else "strict"
        encoding = os.device_encoding(number) or locale.getencoding()
        lines = name == "stderr" or os.isatty(number)
        stream = io.TextIOWrapper(raw, encoding, errors, line_buffering=lines)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _take_signals_and_terminal(terminal: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and so do its children
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C typed there becomes a signal


def _fork_ranks(order: dict[str, Any]) -> dict[str, Any]:
    """Fork the processes that a launcher will start, while it has one thread; there they wait until it does.

    Returns the order: in each of them its own, with the arguments and the environment that the launcher gives it.
    """
    count = int(order["args"][order["args"].index("--gpus") + 1]) if "--gpus" in order["args"] else 0
    if count <= 1 and "--nnodes" not in order["args"]:
        return order
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    waiting: list[tuple[int, socket.socket]] = []
    for _ in range(count or 1):
        channel, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if not pid:
            os.setsid()
            for other in (channel, *(other for _, other in waiting)):
                other.close()
            with end:
                message = end.recv(2**20)
            if not message:  # the launcher ended before it started any
                os._exit(0)
            return order | json.loads(message)
        end.close()
        waiting.append((pid, channel))

    class Started(subprocess.Popen):
        """The next of those that wait; a process that is started afresh when none does."""

        def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others) -> None:
            if not waiting:
                super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others)
                return
            assert list(args[:3]) == [sys.executable, "-m", "minimind_v"]
            self.pid, channel = waiting.pop(0)
            self._child_created = True
            with channel:
                channel.send(json.dumps({"args": args[3:], "env": env, "cwd": str(Path.cwd())}).encode())

    subprocess_handler.Popen = Started
    return order


def _run(order: dict[str, Any]) -> None:
    """Run the installed script as an order says."""
    _take_signals_and_terminal(order["terminal"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(order["env"])
    time.tzset()
    os.chdir(order["cwd"])
    if order["prepare"]:
        module, name = order["prepare"]
        getattr(importlib.import_module(module), name)()
    sys.argv = [str(MMV), *order["args"]]
    runpy.run_path(str(MMV), run_name="__main__")


if __name__ == "__main__":
    if not sys.argv[1].isdigit():
        _run(json.loads(sys.argv[1]))
    elif order := _serve(socket.socket(fileno=int(sys.argv[1]))):
        _run(_fork_ranks(order))
