"""Start several processes with torch's elastic launcher, and report one error for all of them.

A process that fails writes its error into a folder that all share, and the launcher reports it: of several errors, the
first that is not about the end of another process. A process that another torchrun started reports its own errors.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_v.core.errors import LostContact, MmvError, RunError, UsageError
from minimind_v.core.signals import SIGNALS

ERRORS = "MMV_ERRORS"  # the variable that names the folder of the errors
LAUNCHER = "MMV_LAUNCHER"  # the launcher's process id: it may have ended before a process asks for its parent
PROGRAM = "MMV_PROGRAM"  # how the user called the launcher
SIOCGIFADDR = 0x8915  # Linux: the address of an interface
MEETING = 600  # seconds that machines may be started apart
PATIENCE = 600  # seconds that a process may take to finish its step and to save, before it is killed


@dataclass(frozen=True)
class Launch:
    """The processes to start on this machine, and the other machines."""

    processes: int
    nnodes: int = 1
    node_rank: int | None = None
    rdzv_endpoint: str | None = None  # host:port of the first machine
    max_restarts: int = 0  # times that all processes start again from the last state when one was lost

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("gpus", self.processes, 1),
            ("nnodes", self.nnodes, 1),
            ("node-rank", self.node_rank or 0, 0),
            ("max-restarts", self.max_restarts, 0),
        ):
            if value < least:
                raise UsageError(f"--{flag} must be at least {least}, not {value}")
        if self.nnodes == 1 and (self.rdzv_endpoint or self.node_rank):
            raise UsageError(
                "--rdzv-endpoint and --node-rank are for several machines — give their number with --nnodes"
            )
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise UsageError(
                f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT of the first machine, the same on all machines"
            )
        if self.rdzv_endpoint and not re.fullmatch(r".+:\d+", self.rdzv_endpoint):
            raise UsageError(f"--rdzv-endpoint {self.rdzv_endpoint} must have the form HOST:PORT")
        if (self.node_rank or 0) >= self.nnodes:
            raise UsageError(
                f"--node-rank {self.node_rank} must be at most {self.nnodes - 1} with {self.nnodes} machines"
            )

    @property
    def needed(self) -> bool:
        """Whether it takes more than this process."""
        return self.processes > 1 or self.nnodes > 1


def hush() -> None:
    """Silence the warnings of torch's launcher; call it before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # errors are raised as well


def launch(plan: Launch, program: str, arguments: Sequence[str], say: Callable[[str], None]) -> None:
    """Run `mmv` with these arguments in every process, to the end; hints name it as `program`.

    Raises the error of the process that failed first, with its exit code; SystemExit where a signal stopped them all.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import launch_agent

    logging.disable()  # torch's messages are for its developers; this process logs nothing itself
    # Threads of several processes on the same cores wait for each other: to each its share.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // plan.processes)))
    if plan.nnodes > 1:
        _check_host(plan)
        say(f"{plan.nnodes} machines connect at {plan.rdzv_endpoint}: waiting up to {MEETING} s for the others")
    with tempfile.TemporaryDirectory(prefix="mmv-") as folder:
        os.environ |= {ERRORS: folder, LAUNCHER: str(os.getpid()), PROGRAM: program}
        try:
            launch_agent(_elastic(plan), sys.executable, ["-m", "minimind_v", *arguments])
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
            if codes <= {128 + number for number in SIGNALS}:  # a signal stopped one process, and all followed
                raise SystemExit(max(codes)) from None
            raise _first_error(Path(folder), error) from None
        except SignalException as stop:
            raise SystemExit(128 + stop.sigval) from None
        except MmvError:
            raise
        except Exception as error:  # the rendezvous: many kinds
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise RunError(f"{_met_nobody(plan)} ({first})") from None
        finally:
            del os.environ[ERRORS], os.environ[PROGRAM]  # this process reports its own errors


def _check_host(plan: Launch) -> None:
    host = (plan.rdzv_endpoint or "").rpartition(":")[0]
    try:
        socket.getaddrinfo(host.strip("[]"), None)
    except OSError as error:
        raise UsageError(f"--rdzv-endpoint: no host {host} ({error.strerror})") from None


def _met_nobody(plan: Launch) -> str:
    if plan.nnodes == 1:
        return "the processes could not connect to each other"
    return (
        f"{plan.nnodes} machines did not connect at {plan.rdzv_endpoint} — start the command on each, with its own "
        "--node-rank and the same --rdzv-endpoint, an address of the first machine that all others can reach"
    )


def _elastic(plan: Launch) -> Any:
    """The same settings for torch's launcher."""
    from torch.distributed.launcher.api import LaunchConfig

    alone = plan.nnodes == 1  # no other machine takes part in this run
    ranked = plan.node_rank is not None and not alone
    meeting = plan.rdzv_endpoint or "127.0.0.1:0"
    way = way_to(meeting.rpartition(":")[0])
    return LaunchConfig(
        min_nodes=plan.nnodes,
        max_nodes=plan.nnodes,
        nproc_per_node=plan.processes,
        run_id="mmv",
        rdzv_backend="static" if ranked else "c10d",
        rdzv_endpoint=meeting,
        rdzv_configs={"rank": plan.node_rank} if ranked else {"is_host": True} if alone else {},
        local_addr=way.address if way else None,
        rdzv_timeout=MEETING,
        max_restarts=plan.max_restarts,
        signals_to_handle=",".join(["SIGQUIT"] * hasattr(signal, "SIGQUIT") + [number.name for number in SIGNALS]),
        shutdown_timeout=PATIENCE,
    )


@dataclass(frozen=True)
class Way:
    """The network path from this machine to another, or to itself."""

    address: str  # of this machine, for the other
    interface: str


def way_to(host: str) -> Way | None:
    """The way to a host by IPv4; None where the system does not report it. Nothing is sent."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # an interface without an address
                    reply = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                    if socket.inet_ntoa(reply[20:24]) == address:
                        return Way(address, name)
    except (ImportError, OSError):
        pass
    return None


# --- errors -----------------------------------------------------------------------------------------------------------


def report_to_launcher(message: str, error: Exception) -> bool:
    """Write an error for the launcher. False without a launcher: then this process must report it.

    Errors that a user can cause are final: another start does not correct a wrong option.
    """
    if ERRORS not in os.environ:
        return False
    kind = "lost" if isinstance(error, LostContact) else "final" if isinstance(error, MmvError) else "crash"
    entry = {"kind": kind, "message": message, "code": getattr(error, "exit_code", 1), "time": time.time()}
    rank = os.environ.get("RANK", "0")
    path = Path(os.environ[ERRORS]) / f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{rank}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(entry), encoding="utf-8")
    temporary.replace(path)
    return True


def obey_launcher() -> None:
    """In a launched process: end at once after a final error of another process, and when the launcher ends."""
    if ERRORS not in os.environ:
        return
    from minimind_v.core.processes import Parent

    for entry in _entries(Path(os.environ[ERRORS])):
        if entry["kind"] == "final":
            raise SystemExit(entry["code"])
    Parent(int(os.environ[LAUNCHER])).end_with_it()


def _first_error(folder: Path, error: Any) -> MmvError:
    """The error that ended the run: the first reported one, else the end of a killed process."""
    entries = _entries(folder)
    for kind in ("final", "crash"):
        for entry in entries:
            if entry["kind"] == kind:
                first = RunError(entry["message"])
                first.exit_code = entry["code"]
                return first
    # The processes that lost contact with it ended by themselves or by SIGTERM.
    order = {-signal.SIGTERM: 1}
    rank, failure = min(error.failures.items(), key=lambda item: order.get(item[1].exitcode, int(item[1].exitcode > 0)))
    again = "add --resume to resume from the last state"
    if entries and (failure.exitcode > 0 or failure.exitcode in order):  # all errors are about a lost contact
        return RunError(f"another machine has stopped or cannot be reached — {again}")
    ended = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    hint = ", often because memory ran out" if ended == "SIGKILL" else ""
    return RunError(f"process {rank} was ended by {ended}{hint} — {again}")


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The errors that processes wrote, the earliest first."""
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(entries, key=lambda entry: entry["time"])
