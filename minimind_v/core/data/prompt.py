"""From a conversation to token ids: the text, the supervised tokens, and the positions of images.

The tokenizer's chat layout (`layouts.py`) defines how messages become text, and which text is supervised.
"""

from __future__ import annotations

from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from minimind_v.core.data.layouts import ChatLayout, Piece
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import RowError
from minimind_v.core.rows.row import IMAGE_MARK
from minimind_v.core.wording import plural

TURNS = ("user", "tool"), ("assistant",)  # roles of messages that alternate
MOST_MESSAGES = 10_000  # of a row: 32768 positions hold fewer
TEXT_LIMIT = 10**6  # characters of a message that a row encodes: more than 32768 positions can hold, but no gigabytes


@dataclass
class Tokens:
    """Token ids; each is supervised or not, and an image's placeholder or not."""

    input_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    image_mask: list[bool] = field(default_factory=list)
    images: int = 0
    answers: int = field(default=0, compare=False)  # of a row
    answers_cut: int = field(default=0, compare=False)  # how many of these are cut short or cut off
    unmarked: int = field(default=0, compare=False)  # images of a text row, which has no mark
    notes: tuple[str, ...] = field(default=(), compare=False)  # of the row

    def __len__(self) -> int:
        return len(self.input_ids)

    def __iadd__(self, other: Tokens) -> Tokens:
        self.input_ids += other.input_ids
        self.loss_mask += other.loss_mask
        self.image_mask += other.image_mask
        self.images += other.images
        return self

    def cut(self, length: int, tokens_per_image: int) -> Tokens:
        """The first `length` tokens, or fewer: no cut goes through an image."""
        images, rest = divmod(sum(self.image_mask[:length]), tokens_per_image)
        length -= rest
        return Tokens(self.input_ids[:length], self.loss_mask[:length], self.image_mask[:length], images)


@dataclass(frozen=True)
class PackedTokens:
    """The tokens of a row as arrays [T], for the token store and for batches."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    image_mask: np.ndarray
    images: int
    answers: int
    answers_cut: int
    unmarked: int = 0  # images of a text row
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


class PromptEncoder:
    """Encodes conversations with a tokenizer and a number of placeholders per image."""

    def __init__(self, tokenizer: Tokenizer, tokens_per_image: int) -> None:
        self.tokenizer = tokenizer
        self.tokens_per_image = tokens_per_image
        self._system: tuple[str | None, Tokens] = None, Tokens()  # the last one; most rows have the same

    @property
    def layout(self) -> ChatLayout:
        return self.tokenizer.chat_layout

    def row(
        self, conversations: Any, images: int, max_length: int, draw: Random | None = None, evaluated: bool = False
    ) -> Tokens:
        """A row of at most `max_length` tokens, cut after the last whole turn that fits.

        A training row draws its form where the layout has several; a drawn form that does not fit whole gives way to
        the plain one, so that a draw cuts nothing. Without `draw` a row has the plain form, or that of evaluation.
        `images` is the number of the row's images; `Tokens.images` counts those before the cut. A row with images and
        no mark is a text row: `Tokens.unmarked` counts its images.
        Raises RowError if the conversation is malformed, marks and images differ in number, or the prompt is too long.
        """
        layout = self.layout.of_evaluation() if evaluated else self.layout.of_row(None)
        if draw is not None and (drawn := self.layout.of_row(draw)) != layout:
            with suppress(RowError):  # of the plain form, too, or it is too long
                tokens = self._row(conversations, images, max_length, drawn)
                if not tokens.answers_cut:
                    return tokens
        return self._row(conversations, images, max_length, layout)

    def _row(self, conversations: Any, images: int, max_length: int, layout: ChatLayout) -> Tokens:
        messages = check_conversations(conversations, layout)
        encoded = self._opening(messages, layout)
        turns = [message for message in messages if message["role"] != "system"]
        marks = sum(turn["content"].count(IMAGE_MARK) for turn in turns)
        if encoded.images:
            raise RowError(f"{IMAGE_MARK} in the system message", "roles")
        if marks and marks != images:
            raise RowError(f"{plural(marks, f'{IMAGE_MARK} mark')} for {plural(images, 'image')}", "placeholders")
        if len(turns) == 1:
            raise RowError("the question has no answer", "no answer")
        answers, whole = len(turns) // 2, 0
        # Not strict: a last question without an answer is dropped with its images.
        for question, answer in zip(turns[::2], turns[1::2], strict=False):
            prompt = self._message(question["role"], question["content"][:TEXT_LIMIT], layout)
            reply = self._message("assistant", answer["content"][:TEXT_LIMIT], layout)
            if len(encoded) + len(prompt) + len(reply) <= max_length:
                encoded += prompt
                encoded += reply
                whole += 1
                continue
            if not any(encoded.loss_mask):  # the first turn is too long: keep the beginning of its answer
                encoded += prompt
                encoded += reply
                encoded = encoded.cut(max_length, self.tokens_per_image)
            break
        if not any(encoded.loss_mask):
            raise RowError(f"the prompt alone is longer than {max_length} tokens", "too long")
        encoded.answers, encoded.answers_cut = answers, answers - whole
        encoded.unmarked = 0 if marks else images
        return encoded

    def prompt(self, conversations: Any, think: bool = False) -> Tokens:
        """The tokens before an answer: all messages, and the start of the answer, which may be reasoning.

        Raises RowError for a malformed conversation, UsageError for reasoning in a layout without it.
        """
        encoded = Tokens()
        for tokens in self.turns(conversations, think):
            encoded += tokens
        return encoded

    def turns(self, conversations: Any, think: bool = False) -> list[Tokens]:
        """`prompt` in pieces: the system message or nothing, then each question with its answer.

        The start of the new answer is in the last one. An image mark in an answer, which a model wrote, is text.
        """
        messages = check_conversations(conversations, self.layout)
        turns = [Tokens()]
        turns[0] += self._opening(messages, self.layout)
        for message in messages[messages[0]["role"] == "system" :]:
            is_answer = message["role"] == "assistant"
            if not is_answer:
                turns.append(Tokens())
            turns[-1] += self._encode(self.layout.message(message["role"], message["content"]), marks=not is_answer)
        turns[-1] += self.answer_start(think)
        return turns

    def follow_up(self, question: str, think: bool = False) -> Tokens:
        """A further question, after a complete answer and its end, and the start of its answer."""
        encoded = self._message("user", question, self.layout)
        encoded += self.answer_start(think)
        return encoded

    def answer(self, content: str) -> Tokens:
        """A whole message of the assistant, as a later prompt has it. It is text: no mark in it becomes an image."""
        [message] = self.layout.messages([{"role": "assistant", "content": content}])
        return self._encode(self.layout.message("assistant", message["content"]), marks=False)

    def answer_start(self, think: bool = False) -> Tokens:
        """The tokens before an answer, or before its reasoning. Raises UsageError for a layout without reasoning."""
        return self._encode(self.layout.reasoning_start() if think else self.layout.answer_start())

    def answer_end(self) -> Tokens:
        """The tokens after an answer."""
        return self._encode(self.layout.answer_end())

    def _opening(self, messages: list[dict[str, str]], layout: ChatLayout) -> Tokens:
        """The system message, if there is one: the conversation's own or the layout's."""
        own = messages[0]["role"] == "system"
        system = messages[0]["content"] if own else layout.system_prompt
        opening = Tokens()
        if system is not None:
            if self._system[0] != system:
                self._system = system, self._message("system", system, layout)
            opening += self._system[1]
        return opening

    def _message(self, role: str, content: str, layout: ChatLayout) -> Tokens:
        return self._encode(layout.message(role, content))

    def _encode(self, pieces: list[Piece], marks: bool = True) -> Tokens:
        """The tokens of pieces; with `marks` each image mark in a text becomes an image's placeholders."""
        tokens = Tokens()
        for piece in pieces:
            if piece.is_token:
                ids, starts, image_mask = [self.tokenizer.token_id(piece.text)], [0], [False]
            else:
                texts = piece.text.split(IMAGE_MARK) if marks else [piece.text]
                ids, starts, image_mask = self._encode_text(texts)
                tokens.images += len(texts) - 1
            tokens.input_ids += ids
            tokens.image_mask += image_mask
            begin = piece.supervised_from
            tokens.loss_mask += [
                begin is not None and start >= begin and not image
                for start, image in zip(starts, image_mask, strict=True)
            ]
        return tokens

    def _encode_text(self, pieces: list[str]) -> tuple[list[int], list[int], list[bool]]:
        """Ids of a text with an image between two pieces; the character that each starts at; which are patches.

        Images become runs of placeholders, and the whole text is encoded at once; only these placeholders are
        patches, never a user's own. If the tokenizer would merge a placeholder with its neighbours, or the placeholder
        is a special token, the pieces are encoded one by one instead.
        """
        placeholder = self.layout.placeholder
        if len(pieces) > 1 and len(placeholder) > 1:
            return self._encode_apart(pieces)
        run = placeholder * self.tokens_per_image
        whole = self.tokenizer.encode(run.join(pieces))
        ids, starts = whole.ids, [start for start, _ in whole.offsets]
        image_mask = [False] * len(ids)
        if len(pieces) == 1:
            return ids, starts, image_mask
        placeholders, begin = [self.tokenizer.placeholder_id] * len(run), 0
        for piece in pieces[:-1]:
            begin += len(piece)
            first = bisect_left(starts, begin)
            last, end = first + len(run), begin + len(run)
            if ids[first:last] != placeholders or starts[first:last] != list(range(begin, end)):
                return self._encode_apart(pieces)
            image_mask[first:last] = [True] * len(run)
            begin = end
        return ids, starts, image_mask

    def _encode_apart(self, pieces: list[str]) -> tuple[list[int], list[int], list[bool]]:
        ids: list[int] = []
        starts: list[int] = []
        image_mask: list[bool] = []
        begin = 0
        for index, piece in enumerate(pieces):
            if index:
                ids += [self.tokenizer.placeholder_id] * self.tokens_per_image
                starts += [begin] * self.tokens_per_image
                image_mask += [True] * self.tokens_per_image
            encoding = self.tokenizer.encode(piece)
            ids += encoding.ids
            starts += [begin + start for start, _ in encoding.offsets]
            image_mask += [False] * len(encoding.ids)
            begin += len(piece)
        return ids, starts, image_mask


def check_conversations(conversations: Any, layout: ChatLayout) -> list[dict[str, str]]:
    """The messages of a row in a layout: an optional system message, then user (or tool) and assistant in turn.

    Raises RowError otherwise.
    """
    if not isinstance(conversations, list) or not conversations:
        raise RowError("`conversations` is not a list of messages", "conversations")
    if len(conversations) > MOST_MESSAGES:
        raise RowError(f"{len(conversations):,} messages; a row has at most {MOST_MESSAGES:,}", "too long")
    conversations = layout.messages(conversations)
    for number, message in enumerate(conversations, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RowError(f"message {number} has no text in `content`", "conversations")
        if message.get("role") not in layout.roles:
            raise RowError(
                f"message {number} has the role {message.get('role')!r:.40}, not one of {', '.join(layout.roles)}",
                "roles",
            )
    turns = conversations[1:] if conversations[0]["role"] == "system" else conversations
    if not turns or any(turn["role"] not in TURNS[n % 2] for n, turn in enumerate(turns)):
        raise RowError("user and assistant do not alternate", "roles")
    return conversations
