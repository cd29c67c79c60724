"""Decode token ids to text, piece by piece."""

from __future__ import annotations

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
