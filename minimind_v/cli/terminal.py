"""The only user of Rich: results to stdout, talk to stderr; plain lines where nobody watches."""

from __future__ import annotations

import json
import os
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from minimind_v.core.errors import MmvError


class Terminal:
    """Where a command shows things."""

    def __init__(self) -> None:
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """Talk: what is going on."""
        self.err.print(escape(message))

    def warn(self, message: str) -> None:
        self.err.print(f"[yellow]{escape(message)}[/yellow]")

    def fail(self, message: str) -> None:
        self.err.print(f"[bold red]error:[/bold red] {escape(message)}")

    def result(self, text: str, end: str = "\n") -> None:
        """A result, exactly as it is."""
        sys.stdout.write(text + end)
        sys.stdout.flush()

    def json(self, value: Any) -> None:
        """A result for a program, on one line."""
        self.result(json.dumps(value, ensure_ascii=False, default=str))

    def table(self, rows: dict[str, Any]) -> None:
        """Names and values as a result, aligned."""
        width = max(map(len, rows))
        for name, value in rows.items():
            self.result(f"{name:<{width}}  {value}")

    def progress(self, what: str) -> ProgressLine:
        return ProgressLine(self, what)


class ProgressLine:
    """A bar on a terminal, and a line every tenth elsewhere."""

    def __init__(self, terminal: Terminal, what: str) -> None:
        self.terminal = terminal
        self.what = what
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._told = 0

    def __enter__(self) -> ProgressLine:
        if self.terminal.err.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                       TextColumn("{task.fields[note]}"), TimeRemainingColumn())  # fmt: skip
            self._bar = Progress(*columns, console=self.terminal.err, transient=True)
            self._task = self._bar.add_task(self.what, total=None, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif not note and done * 10 // max(total, 1) > self._told:
            self._told = done * 10 // max(total, 1)
            self.terminal.say(f"{self.what} {done}/{total}")


def memory_used() -> str:
    """The most memory that this process has held, in words."""
    try:
        import resource
    except ImportError:  # Windows has no such count
        return "?"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 2**30:.2f} GiB"


def run_app(app: Any) -> None:
    """Run the command line; everything that a user can cause ends as one line and an exit code."""
    debug = "--debug" in sys.argv or bool(os.environ.get("MMV_DEBUG"))
    terminal = Terminal()
    try:
        app()
    except MmvError as error:
        if debug:
            raise
        terminal.fail(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `mmv … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # no permission, no space, a name too long: the system's own words say it
        if debug:
            raise
        terminal.fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        terminal.fail(f"{type(error).__name__}: {error} — this is a defect of mmv; --debug shows where")
        sys.exit(1)
