"""Decode token ids to text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from minimind_v.core.data.thinking import END_THINK
from minimind_v.core.data.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # stands for a character whose bytes are incomplete


class TextStream:
    """Turns ids into pieces of text that hold whole characters: the bytes of one may come in several tokens.

    Only new ids are decoded, so a long answer costs as much per token as a short one. That needs a
    tokenizer whose text is that of its tokens side by side, as every byte-level one's is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """The text that is complete with this id; empty where none is."""
        self._waiting.append(token)
        text = self.tokenizer.decode(self._waiting)
        if text.endswith(BROKEN):
            return ""
        self._waiting.clear()
        return text

    def rest(self) -> str:
        """The remaining text after the last id."""
        text = self.tokenizer.decode(self._waiting) if self._waiting else ""
        self._waiting.clear()
        return text


def split_stream(pieces: Iterable[str], think: bool) -> Iterator[tuple[bool, str]]:
    """The pieces of an answer, each with whether it is reasoning; `think`: the prompt has opened the think block.

    The texts of both are those of `split_answer`.
    """
    waiting, reasoning, begun = "", think, not think
    for piece in pieces:
        waiting += piece
        if reasoning and END_THINK in waiting:
            last, _, waiting = waiting.partition(END_THINK)
            if last := last.rstrip("\n"):
                yield True, last if begun else last.lstrip("\n")
            reasoning = begun = False
        if not begun:
            waiting = waiting.lstrip("\n")
        if size := _certain(waiting) if reasoning else len(waiting):
            yield reasoning, waiting[:size]
            waiting, begun = waiting[size:], True
    if rest := waiting.rstrip("\n"):
        yield True, rest


def _certain(text: str) -> int:
    """Characters that are reasoning for certain: newlines at the end, and a beginning of the tag, may be of the tag."""
    tag = next((size for size in range(len(END_THINK) - 1, 0, -1) if text.endswith(END_THINK[:size])), 0)
    return len(text[: len(text) - tag].rstrip("\n"))
