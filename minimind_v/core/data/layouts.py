"""Chat layouts: how the messages of a conversation become the text that a model reads, by name.

A layout writes pieces. Each is encoded by itself, so that only the layout writes special tokens: a user's text stays
text. Texts whose ids depend on each other belong into one piece.
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
    """A chat layout; roles are system, user and assistant."""

    system_prompt: str | None = None  # of a conversation without a system message
    placeholder = "@"  # the token that reserves a patch's position, at a message's `<image>` mark
    end_token = "<|im_end|>"  # generation stops at it

    def message(self, role: str, content: str) -> list[Piece]:
        """One whole message, an answer's end included."""
        raise NotImplementedError

    def answer_start(self) -> list[Piece]:
        """The pieces before an answer: the end of a prompt."""
        raise NotImplementedError

    def answer_end(self) -> list[Piece]:
        """The pieces after an answer: the end token, and the text before the next message."""
        return [Piece(self.end_token, is_token=True, supervised_from=0), Piece("\n", supervised_from=0)]


class ChatML(ChatLayout):
    """The published layout of 2025: `<|im_start|>role\\ncontent<|im_end|>\\n` per message.

    An answer's content, its `<|im_end|>` and the newline after that are supervised. Role and content are one piece, so
    that their ids are those of the whole text.
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
    """The layout of this name. Raises UsageError for an unknown name."""
    if name not in CHAT_LAYOUTS:
        raise UsageError(f"data.layout {name!r} must be one of {', '.join(CHAT_LAYOUTS)}{nearest(name, CHAT_LAYOUTS)}")
    return CHAT_LAYOUTS[name]
