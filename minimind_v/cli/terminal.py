"""The terminal: results go to stdout, messages to stderr; without a terminal, plain lines."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from minimind_v.cli.word_wrap import Unchanged, WordWrap, wrap
from minimind_v.core.errors import MmvError, readable
from minimind_v.core.extensions import error_of_extension
from minimind_v.core.files import as_json
from minimind_v.core.train.launch import PROGRAM, report_to_launcher


class Verbosity(IntEnum):
    """The output of a command besides its results and errors."""

    quiet = -1  # nothing
    normal = 0  # messages, warnings, progress
    detail = 1  # and details


class Terminal:
    """The output of a command."""

    verbosity = Verbosity.normal  # of the whole program

    def __init__(self, plain: bool = False, wraps: bool = False) -> None:
        """`plain`: without colours and styles, also on a terminal; `wraps`: lines break between words there."""
        self._wraps = wraps
        style: dict[str, Any] = {"highlight": False, "soft_wrap": True} | ({"color_system": None} if plain else {})
        self.out = Console(**style)
        self._loud = Console(stderr=True, **style)  # also with --quiet
        self.err = Console(stderr=True, quiet=True, **style) if self.verbosity is Verbosity.quiet else self._loud

    def say(self, message: str) -> None:
        """Write a message about the progress of a command."""
        self.err.print(escape(self._lines(message)))

    def record(self, line: str) -> None:
        """Write a line of a log to stderr, unchanged."""
        with suppress(OSError, ValueError):  # a reader that is gone ends no server
            if not self.err.quiet:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()

    @property
    def is_live(self) -> bool:
        """Whether progress is drawn: on a terminal, without --quiet."""
        return self.err.is_terminal and not self.err.quiet

    def detail(self, message: str) -> None:
        """Write a message that only --verbose shows."""
        if self.verbosity is Verbosity.detail:
            self.err.print(Text(message, "dim"))

    def warn(self, message: str, always: bool = False) -> None:
        """Write a warning; `always`, since a result is lost, also where --quiet is given."""
        console = self._loud if always and self.err.quiet else self.err
        console.print(f"[yellow]{escape(self._lines(readable(message)))}[/yellow]")

    def fail(self, message: str, *items: str) -> None:
        """Write an error, with each item on a line below it, also where --quiet is given."""
        self._loud.print(f"[bold red]error:[/bold red] {escape(readable(message))}")
        for item in items:
            self._loud.print(f"  {escape(readable(item))}")

    def result(self, text: str, end: str = "\n") -> None:
        """Write a result to stdout, unchanged."""
        sys.stdout.write(text + end)
        sys.stdout.flush()

    def _lines(self, message: str) -> str:
        return wrap(message, self.err.width) if self._wraps_on(self.err) else message

    def _wraps_on(self, console: Console) -> bool:
        return self._wraps and console.file.isatty()

    def streams(self) -> tuple[WordWrap | Unchanged, WordWrap | Unchanged]:
        """Where a text that comes in pieces is written: a model's answer, and its reasoning."""
        return self._stream(self.out, lambda text: self.result(text, end="")), self._stream(self.err, self.reasoning)

    def _stream(self, console: Console, write: Callable[[str], None]) -> WordWrap | Unchanged:
        return WordWrap(write, lambda: console.width) if self._wraps_on(console) else Unchanged(write)

    def reasoning(self, text: str) -> None:
        """Write a piece of a model's reasoning, dimmed."""
        self.err.print(Text(text, "dim"), end="")

    def json(self, value: Any, **lists: Iterable[Any]) -> None:
        """Write a result for a program, on one line. `lists` are further keys, written item by item."""
        encoding = sys.stdout.encoding or "utf-8"
        text = as_json(value, encoding)
        for name, items in lists.items():
            sys.stdout.write(f'{text[:-1]}, "{name}": [')
            for number, item in enumerate(items):
                sys.stdout.write(", " * (number > 0) + as_json(item, encoding))
            text = "]}"
        self.result(text)

    def table(self, rows: dict[str, Any]) -> None:
        """Write names and values as a result, aligned."""
        width = max(map(len, rows))
        for name, value in rows.items():
            self.result(f"{name:<{width}}  {readable(str(value))}")

    def pieces(self, line: list[tuple[str, str]]) -> None:
        """Write a line as a result; on a terminal each piece has its style."""
        if self.out.is_terminal:
            self.out.print(Text.assemble(*line))
        else:
            self.result("".join(text for text, _ in line))

    def progress(self, what: str) -> ProgressLine:
        return ProgressLine(self, what)


class ProgressLine:
    """A progress bar on a terminal; elsewhere one line for each tenth. Both with the rate and the time that is left."""

    def __init__(self, terminal: Terminal, what: str) -> None:
        self.terminal = terminal
        self.what = what
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._restart()

    def __enter__(self) -> ProgressLine:
        if self.terminal.is_live:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                       TextColumn("{task.fields[note]}"), RateColumn(), TimeRemainingColumn())  # fmt: skip
            # A result that is written meanwhile stays on stdout.
            self._bar = Progress(*columns, console=self.terminal.err, transient=True, redirect_stdout=False)
            self._task = self._bar.add_task(self.what, total=None, note="", visible=False)  # until its total is known
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def _restart(self) -> None:
        self._tenth = 0  # the last reported one
        self._then = (time.monotonic(), 0)  # when it was reported, and what was done

    def begin(self, what: str) -> ProgressLine:
        """Begin the next stage of the work, which is counted from 0."""
        self.what = what
        self._restart()
        if self._bar:
            self._bar.reset(self._task, total=None, description=what)
        return self

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=note, visible=True)
        elif not note and done * 10 // max(total, 1) > self._tenth:
            self._tenth = done * 10 // max(total, 1)
            (then, done_then), self._then = self._then, (time.monotonic(), done)
            rate = (done - done_then) / max(self._then[0] - then, 1e-3)
            self.terminal.say(f"{self.what} {done}/{total}, {rate:,.1f}/s, {(total - done) / rate:,.0f} s left")


class RateColumn(ProgressColumn):
    """How much is done in a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f}/s" if task.speed else "")


class BytesProgress:
    """Progress of a download: two bars on a terminal; elsewhere one line for each tenth, or every 20 seconds."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: tuple[float, int] | None = None  # time, and bytes at that time
        self._last_line = (0.0, -1)  # time, and tenth

    def __enter__(self) -> BytesProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, message: str) -> None:
        self.terminal.say(message)

    def warn(self, message: str) -> None:
        self.terminal.warn(message)

    def bytes_here(self, file: str, received: int, size: int, all_received: int, all_size: int) -> None:
        """Show `here` of the `size` bytes of `file`, and `all_here` of `all_size` bytes of all files."""
        if self.terminal.is_live:
            self._draw(file, received, size)
            self._draw("all", all_received, all_size)
            return
        now = time.monotonic()
        began, first = self._began = self._began or (now, all_received)
        tenth = all_received * 10 // max(all_size, 1)
        if tenth == self._last_line[1] and now - self._last_line[0] < 20:
            return
        self._last_line = (now, tenth)
        rate = (all_received - first) / (now - began) if now > began else 0.0
        left = f", {rate / 1e6:,.1f} MB/s, {(all_size - all_received) / rate:,.0f} s left" if rate else ""
        of_all = f"all {all_received * 100 // max(all_size, 1)}% of {all_size / 1e6:,.1f} MB"
        self.say(f"{file}: {received / 1e6:,.1f} of {size / 1e6:,.1f} MB; {of_all}{left}")

    def _draw(self, name: str, received: int, size: int) -> None:
        if not self._bars:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                       TimeRemainingColumn())  # fmt: skip
            self._bars = Progress(*columns, console=self.terminal.err)
            self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(escape(name), total=size)
        self._bars.update(self._tasks[name], completed=received, total=size)


def command_line(*arguments: object) -> str:
    """A command line to paste into this shell: `mmv` where that is this program, else as it was called."""
    return " ".join([os.environ.get(PROGRAM) or _program(), *([shlex.join(map(str, arguments))] if arguments else [])])


def _program() -> str:
    called, on_path = Path(sys.argv[0]), shutil.which("mmv")
    is_module = called.name == "__main__.py"
    own = Path(sys.executable).with_name("mmv") if is_module else called  # of this installation
    if on_path and own.exists() and own.samefile(on_path):
        return "mmv"
    return shlex.join([sys.executable, "-m", "minimind_v"] if is_module else [str(called)])


def run_app(app: Any) -> None:
    """Run the command line. Each error that a user can cause ends as one line and an exit code."""
    debug = "--debug" in sys.argv or bool(os.environ.get("MMV_DEBUG"))
    _prepare_streams()
    Terminal.verbosity, start = Verbosity.normal, time.monotonic()
    with _ctrl_c() as pressed:
        try:
            code = app(standalone_mode=False)
            Terminal().detail(f"done in {time.monotonic() - start:.1f} s")
            sys.exit(code if isinstance(code, int) else 0)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # `mmv … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if pressed:  # a library may turn the interruption into an error of its own
                sys.exit(130)
            if hasattr(error, "format_message"):
                _fail_usage(error)
            if debug:
                raise
            message, code = _describe(error)
            if not report_to_launcher(message, error):
                Terminal().fail(*(error.lines if isinstance(error, MmvError) else [message]))
            sys.exit(code)


def _prepare_streams() -> None:
    """Replace closed streams, and write as escapes what an encoding lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`: no other file may take its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        # A file's name may be no text, and a terminal may lack Chinese characters. stderr writes escapes by itself.
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail_usage(error: Any) -> NoReturn:
    """End with the line of an error that the parser of the command line raised."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        message = readable(error.format_message()).rstrip(".")
        Terminal().fail(f"{message} — see `{context.command_path} --help`" if context else message)
    sys.exit(error.exit_code)


def _describe(error: Exception) -> tuple[str, int]:
    """The one line of an error, and the exit code."""
    error = error_of_extension(error) or error
    if isinstance(error, MmvError):
        return str(error), error.exit_code
    if isinstance(error, OSError):  # no permission, no space, a name that is too long
        reason = error.strerror or str(error)
        return (f"{error.filename}: {reason}" if error.filename else reason), 1
    return f"{type(error).__name__}: {error} — this is a bug in mmv; --debug shows the traceback", 1


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt as usual; the list holds the received signals."""
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
