"""Chat layouts: how the messages of a conversation become the text that a model reads, by name.

A layout writes pieces. Each is encoded by itself, so that special tokens are only those that the layout puts there:
what a user types stays text. Where the ids depend on what stands side by side, that belongs into one piece.
"""

from __future__ import annotations

from dataclasses import dataclass

from minimind_v.core.errors import UsageError, nearest


@dataclass(frozen=True)
class Piece:
    """A text, or one token of the vocabulary by its name."""

    text: str
    is_token: bool = False
    supervised_from: int | None = None  # the character from which its tokens are supervised; None: no token is


class ChatLayout:
    """A layout. A subclass says all that differs from one to another; roles are system, user and assistant."""

    system_prompt: str | None = None  # of a conversation that has no system message
    placeholder = "@"  # the token that stands for one feature of an image, where a message has its `<image>` mark
    end_token = "<|im_end|>"  # generation stops at it

    def message(self, role: str, content: str) -> list[Piece]:
        """One whole message, an answer's end included."""
        raise NotImplementedError

    def answer_start(self) -> list[Piece]:
        """What stands before an answer: the end of a prompt."""
        raise NotImplementedError

    def answer_end(self) -> list[Piece]:
        """What stands behind an answer: the end token, and what belongs before the next message."""
        return [Piece(self.end_token, is_token=True, supervised_from=0), Piece("\n", supervised_from=0)]


class ChatML(ChatLayout):
    """The published layout of 2025: `<|im_start|>role\\ncontent<|im_end|>\\n` per message.

    Supervised are an answer's content, its `<|im_end|>` and the newline behind that. Role and content are one piece,
    so that their ids are those of the whole.
    """

    system_prompt = "You are a helpful assistant"

    def message(self, role: str, content: str) -> list[Piece]:
        start, header = Piece("<|im_start|>", is_token=True), f"{role}\n"
        if role == "assistant":
            return [start, Piece(header + content, supervised_from=len(header)), *self.answer_end()]
        return [start, Piece(header + content), Piece(self.end_token, is_token=True), Piece("\n")]

    def answer_start(self) -> list[Piece]:
        return [Piece("<|im_start|>", is_token=True), Piece("assistant\n")]


CHAT_LAYOUTS: dict[str, ChatLayout] = {"chatml": ChatML()}


def find_layout(name: str) -> ChatLayout:
    """Raises UsageError for a name that no layout has."""
    if name not in CHAT_LAYOUTS:
        raise UsageError(f"data.layout {name!r} must be one of {', '.join(CHAT_LAYOUTS)}{nearest(name, CHAT_LAYOUTS)}")
    return CHAT_LAYOUTS[name]
