"""The lines that a user types in a conversation: with editing, history and completion on a terminal, else plain."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from minimind_v.core.paths import state_dir

MOST_LINES = 1000  # of the history
PATH_COMMANDS = ("/image", "/save")  # behind which paths are completed
LONGEST_LINE = 10_000  # characters: a pasted address that holds an image is not kept


class LineReader(Protocol):
    """Reads what a user types."""

    edits: bool  # whether a line can be given to be changed

    def read(self, prompt: str, text: str = "") -> str:
        """Return the next line; `text` is in it to be changed. Raises EOFError at the end, KeyboardInterrupt."""
        ...


def confirm(question: str) -> bool:
    """Whether the user types yes; the answer is not kept in the history."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (KeyboardInterrupt, EOFError):
        return False


def plain_terminal() -> bool:
    """Whether stdin or stdout is no terminal, or one that cannot move its cursor."""
    are_terminals = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    return not are_terminals or os.environ.get("TERM", "") in ("dumb", "unknown", "")


def take_as_text(errors: str) -> None:
    """Read stdin as UTF-8 where the locale is plain ASCII."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        ascii_only = sys.stdin.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968", "646")
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors=errors)


class PlainLines:
    """Lines of a pipe, or of a terminal that reads them to the user: nothing is drawn again."""

    edits = False

    def __init__(self) -> None:
        take_as_text("surrogateescape")  # as file names are read

    def read(self, prompt: str, text: str = "") -> str:
        """As LineReader.read, without `text`."""
        return input(prompt)


class EditedLines:
    """Lines of a terminal, with the usual keys, the history of all conversations, and completion."""

    edits = True

    def __init__(self, commands: Iterable[str], history: Path | None = None) -> None:
        """`commands` are completed at the beginning of a line, and paths behind those that take one."""
        from prompt_toolkit import PromptSession

        file = history or state_dir() / "chat_history"
        self.session: Any = PromptSession(
            history=_history(file), completer=_completer(list(commands)), complete_while_typing=False,
            enable_open_in_editor=False, mouse_support=False,
        )  # fmt: skip

    def read(self, prompt: str, text: str = "") -> str:
        """As LineReader.read. A pasted text of several lines is one line."""
        line: str = self.session.prompt(prompt, default=text)
        return line


def _completer(commands: list[str]) -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class LineCompleter(Completer):
        """Completes a command, or the path behind one: the last of several."""

        def get_completions(self, document: Document, complete_event: Any) -> Iterator[Completion]:
            command, space, path = document.text_before_cursor.partition(" ")
            if not space and command.startswith("/"):
                for name in commands:
                    if name.startswith(command):
                        yield Completion(name, start_position=-len(command))
            if command in PATH_COMMANDS and space:
                path = path.lstrip()
                for text in dict.fromkeys((path, path.rpartition(" ")[2])):
                    for match in paths.get_completions(Document(text), complete_event):
                        folder = "/" if match.display_text.endswith("/") else ""
                        yield Completion(match.text + folder, match.start_position, match.display)

    return LineCompleter()


def _history(file: Path) -> Any:
    from prompt_toolkit.history import FileHistory

    class BoundedHistory(FileHistory):
        """A history whose file only its user reads; where it cannot be written, the lines last as long as the talk."""

        def load_history_strings(self) -> Iterable[str]:
            with suppress(OSError):
                lines = list(super().load_history_strings())  # the latest first
                if len(lines) > MOST_LINES:
                    _rewrite(file, lines[:MOST_LINES][::-1])
                return lines[:MOST_LINES]
            return []

        def store_string(self, string: str) -> None:
            with suppress(OSError, UnicodeEncodeError):  # bytes that are no text are not kept
                string.encode()
                if string.strip() and len(string) <= LONGEST_LINE:
                    _create(file)
                    super().store_string(string)

    return BoundedHistory(str(file))


def _create(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))


def _rewrite(file: Path, lines: Iterable[str]) -> None:
    """Replace the file by one with these lines, in the form of prompt_toolkit."""
    new = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with open(os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as output:
        for line in lines:
            output.write("\n# kept\n" + "".join(f"+{piece}\n" for piece in line.split("\n")))
    os.replace(new, file)
