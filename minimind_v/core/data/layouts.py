"""Chat layouts: how the messages of a conversation become the text that a model reads, by name.

A layout writes pieces. Each is encoded by itself, so that only the layout writes special tokens: a user's text stays
text. Texts whose ids depend on each other belong into one piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from minimind_v.core.data.thinking import EMPTY_BLOCK, TAGS, THINK, plain_messages
from minimind_v.core.errors import RowError, UsageError, nearest
from minimind_v.core.extensions import Table

# Ours, in the spirit of the published ones: half of them Chinese, some with the model's name.
SYSTEM_PROMPTS = (
    "You are a helpful assistant that answers questions about images and text.",
    "You are MiniMind, a very small model that describes what it sees.",
    "Answer the user's questions carefully and to the point.",
    "You are a friendly assistant. If you do not know the answer, say so.",
    "You are a knowledgeable assistant. Give accurate information.",
    "你是一个乐于助人的助手，回答关于图片和文字的问题。",
    "你是MiniMind，一个很小的模型，请描述你看到的内容。",
    "请认真、简洁地回答用户的问题。",
    "你是一个友好的助手。如果不知道答案，请直接说明。",
    "你是一个知识丰富的助手，请给出准确的信息。",
)
SYSTEM_SHARE = 0.2  # of the training rows without a system message: rows that receive one
PLAIN_SHARE = 0.8  # of the training rows: rows whose empty think blocks are dropped


@dataclass(frozen=True)
class Piece:
    """A text, or one token of the vocabulary by its name."""

    text: str
    is_token: bool = False
    supervised_from: int | None = None  # the character from which its tokens are supervised; None: no token is


class ChatLayout:
    """A chat layout; roles are system, user and assistant."""

    roles: tuple[str, ...] = ("system", "user", "assistant")
    system_prompt: str | None = None  # of a conversation without a system message
    placeholder = "@"  # the token that reserves a patch's position, at a message's `<image>` mark
    end_token = "<|im_end|>"  # generation stops at it
    varies = False  # whether rows have several forms

    def of_row(self, draw: Random | None) -> ChatLayout:
        """The layout of one row of data. A training row draws its form; without `draw` a row has the plain form."""
        return self

    def of_evaluation(self) -> ChatLayout:
        """The layout of rows that are evaluated: what a prompt of chat ends with is there, and is not supervised."""
        return self

    def messages(self, conversation: list[Any]) -> list[Any]:
        """The messages with a role and a content each; further fields of a message are used here or not at all.

        Raises RowError for tools in a layout without them.
        """
        for number, message in enumerate(conversation, 1):
            if isinstance(message, dict) and len(message) > 2 and "tool" not in self.roles:
                _refuse_tools(message, number)
        return conversation

    def message(self, role: str, content: str) -> list[Piece]:
        """One whole message, an answer's end included."""
        raise NotImplementedError

    def answer_start(self) -> list[Piece]:
        """The pieces before an answer: the end of a prompt."""
        raise NotImplementedError

    def reasoning_start(self) -> list[Piece]:
        """The pieces before an answer that begins with reasoning. Raises UsageError for a layout without it."""
        name = next((name for name, layout in CHAT_LAYOUTS.items() if layout is self), type(self).__name__)
        raise UsageError(f"the chat layout {name} has no think block: its model cannot think — leave out --think")

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


@dataclass(frozen=True)
class ChatMLThink(ChatLayout):
    """The layout of minimind-3v: each answer begins with `<think>\\nreasoning\\n</think>\\n\\n`.

    The tags of reasoning and tools are tokens in all messages but the user's, whose text stays text. A row in the
    plain form has no empty think block; in a training row the blocks are kept at times, and a system prompt is added.
    An evaluated answer follows an empty block or, if it has reasoning, `<think>\\n`, as in a prompt of chat.
    """

    system_prompt: str | None = None
    empty_blocks: bool = True  # whether answers without reasoning begin with an empty block
    evaluates: bool = False  # whether the beginning of an answer that a prompt contains is not supervised

    roles = ("system", "user", "assistant", "tool")
    placeholder = "<|image_pad|>"
    varies = True

    def of_row(self, draw: Random | None) -> ChatLayout:
        if draw is None:
            return replace(self, empty_blocks=False)
        prompt = draw.choice(SYSTEM_PROMPTS) if draw.random() < SYSTEM_SHARE else None
        return replace(self, system_prompt=prompt, empty_blocks=draw.random() >= PLAIN_SHARE)

    def of_evaluation(self) -> ChatLayout:
        return replace(self, evaluates=True)

    def messages(self, conversation: list[Any]) -> list[Any]:
        return plain_messages(conversation)

    def message(self, role: str, content: str) -> list[Piece]:
        start = Piece("<|im_start|>", is_token=True)
        if role == "assistant":
            body = content if self.empty_blocks else content.replace(EMPTY_BLOCK, "")
            prompted = ""
            if self.evaluates:
                prompted = EMPTY_BLOCK if body.startswith(EMPTY_BLOCK) else f"{THINK}\n"
            return [start, *_tagged(f"assistant\n{body}", len(f"assistant\n{prompted}")), *self.answer_end()]
        end = [Piece(self.end_token, is_token=True), Piece("\n")]
        if role == "user":
            return [start, Piece(f"user\n{content}"), *end]
        return [start, *_tagged(f"user{content}" if role == "tool" else f"{role}\n{content}"), *end]

    def answer_start(self) -> list[Piece]:
        return [Piece("<|im_start|>", is_token=True), *_tagged(f"assistant\n{EMPTY_BLOCK}")]

    def reasoning_start(self) -> list[Piece]:
        return [Piece("<|im_start|>", is_token=True), *_tagged(f"assistant\n{THINK}\n")]


def _refuse_tools(message: dict[str, Any], number: int) -> None:
    for key in ("tools", "tool_calls"):
        if message.get(key) not in (None, "", [], "[]", "null"):
            raise RowError(
                f"message {number} has `{key}`, but this chat layout has no tools — use the tokenizer of minimind-3v",
                "roles",
            )


_TAG = re.compile(f"({'|'.join(TAGS)})")


def _tagged(text: str, supervised_from: int | None = None) -> Iterator[Piece]:
    """The pieces of a text whose tags are tokens."""
    begin = 0
    for piece in filter(None, _TAG.split(text)):
        within = None
        if supervised_from is not None and supervised_from < begin + len(piece):
            within = max(0, supervised_from - begin)
        yield Piece(piece, piece in TAGS, within)
        begin += len(piece)


CHAT_LAYOUTS: Table[ChatLayout] = Table({"chatml": ChatML(), "chatml-think": ChatMLThink()})


def find_layout(name: str) -> ChatLayout:
    """The layout of this name. Raises UsageError for an unknown name."""
    if name not in CHAT_LAYOUTS:
        raise UsageError(f"data.layout {name!r} must be one of {', '.join(CHAT_LAYOUTS)}{nearest(name, CHAT_LAYOUTS)}")
    return CHAT_LAYOUTS[name]
