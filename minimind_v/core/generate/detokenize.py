"""Decode token ids to text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from minimind_v.core.data.thinking import END_THINK
from minimind_v.core.data.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # stands for a character whose bytes are incomplete


class TextStream:
    """Turns ids into pieces of text that hold whole characters: the bytes of one may come in several tokens.

    Only new ids are decoded, so a long answer costs as much per token as a short one. That needs a
    tokenizer whose text is that of its tokens side by side, as every byte-level one's is.

    The text ends before the first of the strings `stop`; what may be the beginning of one waits for the next ids.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False  # whether one of `stop` has come
        self._waiting: list[int] = []
        self._text = ""  # which may be the beginning of one

    def add(self, token: int) -> str:
        """The text that is complete with this id; empty where none is."""
        self._waiting.append(token)
        text = self.tokenizer.decode(self._waiting)
        if text.endswith(BROKEN):
            return ""
        self._waiting.clear()
        return self._before_stop(text)

    def rest(self) -> str:
        """The remaining text after the last id."""
        text = self.tokenizer.decode(self._waiting) if self._waiting else ""
        self._waiting.clear()
        complete = self._before_stop(text)
        rest, self._text = self._text, ""
        return complete + rest

    def _before_stop(self, text: str) -> str:
        if not self.stop or self.stopped:
            return "" if self.stopped else text
        self._text += text
        if ends := [self._text.index(stop) for stop in self.stop if stop in self._text]:
            self.stopped, complete, self._text = True, self._text[: min(ends)], ""
            return complete
        size = len(self._text) - max(_begun(self._text, stop) for stop in self.stop)
        complete, self._text = self._text[:size], self._text[size:]
        return complete


def split_stream(pieces: Iterable[str], think: bool) -> Iterator[tuple[bool, str]]:
    """The pieces of an answer, each with whether it is reasoning; `think`: the prompt has opened the think block.

    The texts of both are those of `split_answer`.
    """
    split = SplitStream(think)
    for piece in pieces:
        yield from split.add(piece)
    yield from split.rest()


class SplitStream:
    """`split_stream` piece by piece."""

    def __init__(self, think: bool) -> None:
        self._waiting, self._reasoning, self._begun = "", think, not think

    def add(self, piece: str) -> list[tuple[bool, str]]:
        """The texts that are complete with a piece."""
        texts: list[tuple[bool, str]] = []
        self._waiting += piece
        if self._reasoning and END_THINK in self._waiting:
            last, _, self._waiting = self._waiting.partition(END_THINK)
            if last := last.rstrip("\n"):
                texts.append((True, last if self._begun else last.lstrip("\n")))
            self._reasoning = self._begun = False
        if not self._begun:
            self._waiting = self._waiting.lstrip("\n")
        if size := _certain(self._waiting) if self._reasoning else len(self._waiting):
            texts.append((self._reasoning, self._waiting[:size]))
            self._waiting, self._begun = self._waiting[size:], True
        return texts

    def rest(self) -> list[tuple[bool, str]]:
        """The remaining text after the last piece."""
        rest, self._waiting = self._waiting.rstrip("\n"), ""
        return [(True, rest)] if rest else []


def _certain(text: str) -> int:
    """Characters that are reasoning for certain: newlines at the end, and a beginning of the tag, may be of the tag."""
    return len(text[: len(text) - _begun(text, END_THINK)].rstrip("\n"))


def _begun(text: str, mark: str) -> int:
    """Characters at the end of a text that are the beginning of a mark, which is not complete."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)
