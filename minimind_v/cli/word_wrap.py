"""Breaks a text that comes piece by piece between its words, as wide as the terminal is at that moment."""

from __future__ import annotations

from collections.abc import Callable

from rich.cells import cell_len

TAB = 8  # cells
STICKY_SPACES = "\N{NO-BREAK SPACE}\N{FIGURE SPACE}\N{NARROW NO-BREAK SPACE}"
NEVER_FIRST = frozenset("，。、；：！？…—～·％）」』】》〉〕｝］”’,.;:!?)]}%")  # of a line
NEVER_LAST = frozenset("（「『【《〈〔｛［“‘([{￥")
JOINER = "\N{ZERO WIDTH JOINER}"  # of several emoji to one


class WordWrap:
    """Writes pieces of a text in lines; a word is held until it is complete, so that it need not be taken back.

    Lines break at spaces, which are left out there, and beside wide characters, as Chinese does. A word that is wider
    than the terminal stays in one piece, which the terminal breaks: copied, such an address is whole.
    """

    def __init__(self, write: Callable[[str], object], width: Callable[[], int]) -> None:
        self._write, self._width = write, width
        self._column, self._spaces, self._word, self._last = 0, "", "", "\n"
        self._goes_on = False  # whether the beginning of the word was written already

    def add(self, text: str) -> None:
        """Write what is complete with this piece."""
        for char in text:
            if char == "\n":
                self.rest()
                self._write(char)
                self._column = 0
            elif char.isspace() and char not in STICKY_SPACES:
                self._end_word()
                self._spaces += char
            else:
                if _breaks_between(self._last, char):
                    self._end_word()
                self._word += char
            self._last = char
        if cell_len(self._word) > self._width():
            self._write_word()
            self._goes_on = True

    def rest(self) -> None:
        """Write what is held; spaces only where the line has room for them."""
        self._end_word()
        if self._column + self._cells_of_spaces() <= self._width():
            self._write_word()
        self._spaces = ""

    def _end_word(self) -> None:
        if self._word:
            self._write_word()
        self._goes_on = False

    def _write_word(self) -> None:
        cells, width, spaces = cell_len(self._word), self._width(), self._cells_of_spaces()
        if self._column and self._column + spaces + cells > width and not self._goes_on:
            self._write("\n" + self._word)
            self._column = cells
        else:
            self._write(self._spaces + self._word)
            self._column += spaces + cells
        self._column = self._column and (self._column - 1) % width + 1
        self._spaces = self._word = ""

    def _cells_of_spaces(self) -> int:
        return cell_len((" " * self._column + self._spaces).expandtabs(TAB)) - self._column


def wrap(text: str, width: int) -> str:
    """A whole text, its lines broken between words."""
    pieces: list[str] = []
    lines = WordWrap(pieces.append, lambda: width)
    lines.add(text)
    lines.rest()
    return "".join(pieces)


class Unchanged:
    """Writes pieces of a text as they come, for what is no terminal."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.add = write

    def rest(self) -> None:
        """Nothing is held."""


def _breaks_between(before: str, after: str) -> bool:
    """Whether a line may end between two characters that no space parts: beside a wide one, as it is no mark."""
    if before == JOINER or not cell_len(after) or after in NEVER_FIRST or before in NEVER_LAST:
        return False
    if "\U0001f3fb" <= after <= "\U0001f3ff" or "\U0001f1e6" <= before <= "\U0001f1ff":  # a skin colour, half a flag
        return False
    return max(cell_len(before), cell_len(after)) > 1
