"""The only user of Rich: results to stdout, talk to stderr; plain lines where nobody watches."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from minimind_v.core.errors import MmvError, readable
from minimind_v.core.files import as_json
from minimind_v.core.train.launch import leave_word


class Terminal:
    """Where a command shows things."""

    def __init__(self) -> None:
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """Talk: what is going on."""
        self.err.print(escape(message))

    def warn(self, message: str) -> None:
        self.err.print(f"[yellow]{escape(readable(message))}[/yellow]")

    def fail(self, message: str) -> None:
        self.err.print(f"[bold red]error:[/bold red] {escape(readable(message))}")

    def result(self, text: str, end: str = "\n") -> None:
        """A result, exactly as it is."""
        sys.stdout.write(text + end)
        sys.stdout.flush()

    def json(self, value: Any, **lists: Iterable[Any]) -> None:
        """A result for a program, on one line. `lists` are further keys, written as their items come."""
        encoding = sys.stdout.encoding or "utf-8"
        text = as_json(value, encoding)
        for name, items in lists.items():
            sys.stdout.write(f'{text[:-1]}, "{name}": [')
            for number, item in enumerate(items):
                sys.stdout.write(", " * (number > 0) + as_json(item, encoding))
            text = "]}"
        self.result(text)

    def table(self, rows: dict[str, Any]) -> None:
        """Names and values as a result, aligned."""
        width = max(map(len, rows))
        for name, value in rows.items():
            self.result(f"{name:<{width}}  {readable(str(value))}")

    def pieces(self, line: list[tuple[str, str]]) -> None:
        """A line as a result, each piece of it with a style that shows on a terminal."""
        if self.out.is_terminal:
            self.out.print(Text.assemble(*line))
        else:
            self.result("".join(text for text, _ in line))

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


class BytesProgress:
    """Bytes that come: a bar for the file and one for all on a terminal; elsewhere a line every tenth or 20 seconds."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: tuple[float, int] | None = None  # when, and how many bytes were here
        self._told = (0.0, -1)  # when, and which tenth

    def __enter__(self) -> BytesProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, message: str) -> None:
        self.terminal.say(message)

    def warn(self, message: str) -> None:
        self.terminal.warn(message)

    def bytes_here(self, file: str, here: int, size: int, all_here: int, all_size: int) -> None:
        """`here` of the `size` bytes of `file`, and `all_here` of `all_size` in all."""
        if self.terminal.err.is_terminal:
            self._draw(file, here, size)
            self._draw("all", all_here, all_size)
            return
        now = time.monotonic()
        began, first = self._began = self._began or (now, all_here)
        tenth = all_here * 10 // max(all_size, 1)
        if tenth == self._told[1] and now - self._told[0] < 20:
            return
        self._told = (now, tenth)
        rate = (all_here - first) / (now - began) if now > began else 0.0
        left = f", {rate / 1e6:,.1f} MB/s, {(all_size - all_here) / rate:,.0f} s left" if rate else ""
        share = all_here * 100 // max(all_size, 1)
        self.say(f"{file}: {here / 1e6:,.1f} of {size / 1e6:,.1f} MB; all {share}% of {all_size / 1e6:,.1f} MB{left}")

    def _draw(self, name: str, here: int, size: int) -> None:
        if not self._bars:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                       TimeRemainingColumn())  # fmt: skip
            self._bars = Progress(*columns, console=self.terminal.err)
            self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(escape(name), total=size)
        self._bars.update(self._tasks[name], completed=here, total=size)


def command_line(*words: object) -> str:
    """A line that can be pasted into the shell that started this program, where `mmv` need not be on the path."""
    me, known = Path(sys.argv[0]), shutil.which("mmv")
    if me.name == "__main__.py":
        program = [sys.executable, "-m", "minimind_v"]
    else:
        program = ["mmv" if known and me.exists() and me.samefile(known) else str(me)]
    return shlex.join([*program, *map(str, words)])


def run_app(app: Any) -> None:
    """Run the command line; everything that a user can cause ends as one line and an exit code."""
    debug = "--debug" in sys.argv or bool(os.environ.get("MMV_DEBUG"))
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`: nobody listens, and no file may take its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        # A file's name need not be text, nor has every terminal Chinese characters: shown as escapes, as on stderr.
        sys.stdout.reconfigure(errors="backslashreplace")
    terminal = Terminal()

    def end(message: str, error: Exception, code: int = 1) -> None:
        if not leave_word(message, error):
            terminal.fail(message)
        sys.exit(code)

    with _ctrl_c() as pressed:
        try:
            app()
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # `mmv … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if pressed:  # what was interrupted has made an error of its own of it, as imports may
                sys.exit(130)
            if debug:
                raise
            if isinstance(error, MmvError):
                end(str(error), error, error.exit_code)
            if isinstance(error, OSError):  # no permission, no space, a name too long: the system's own words say it
                said = error.strerror or str(error)
                end(f"{error.filename}: {said}" if error.filename else said, error)
            end(f"{type(error).__name__}: {error} — this is a defect of mmv; --debug shows where", error)


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Ctrl-C is a KeyboardInterrupt as ever; the list tells whether there was one."""
    pressed: list[int] = []

    def interrupt(number: int, _: object) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    usual = usual and threading.current_thread() is threading.main_thread()  # only there may handlers be set
    if usual:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield pressed
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
