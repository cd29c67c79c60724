"""From a conversation to token ids: the text, the supervised tokens, and the positions of images.

The tokenizer's chat layout (`layouts.py`) says how messages become text, and what of that is supervised.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minimind_v.core.data.layouts import Piece
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import RowError
from minimind_v.core.rows.row import IMAGE_MARK

ROLES = ("system", "user", "assistant")
MOST_MESSAGES = 10_000  # of a row: 32768 positions hold fewer
TEXT_LIMIT = 10**6  # characters of a message that a row looks at: more than 32768 positions can hold, and no gigabytes


@dataclass
class Tokens:
    """Token ids with, for each, whether it is supervised and whether it is a patch of a picture."""

    input_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    image_mask: list[bool] = field(default_factory=list)
    images: int = 0
    answers: int = field(default=0, compare=False)  # of a row: how many it has
    answers_cut: int = field(default=0, compare=False)  # of these, how many are cut short or cut off
    unmarked: int = field(default=0, compare=False)  # pictures of a text row, which no mark shows
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
        """The first `length` tokens, less where the cut would go through a picture."""
        patches = sum(self.image_mask[:length])
        if patches % tokens_per_image:
            length -= patches % tokens_per_image
        images = patches // tokens_per_image
        return Tokens(self.input_ids[:length], self.loss_mask[:length], self.image_mask[:length], images)


@dataclass(frozen=True)
class PackedTokens:
    """The tokens of a row in arrays [T], as they are kept in a file and written into batches."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    image_mask: np.ndarray
    images: int
    answers: int
    answers_cut: int
    unmarked: int = 0  # pictures of a text row
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


class PromptEncoder:
    """Encodes conversations with a tokenizer and a number of placeholders per picture."""

    def __init__(self, tokenizer: Tokenizer, tokens_per_image: int) -> None:
        self.tokenizer = tokenizer
        self.tokens_per_image = tokens_per_image
        self._system: tuple[str | None, Tokens] = None, Tokens()  # the last one: mostly that of all rows

    def row(self, conversations: Any, images: int, max_length: int) -> Tokens:
        """A training row of at most `max_length` tokens, cut after the last whole turn that fits.

        `images` is how many pictures the row has; `Tokens.images` how many of them, from the first, are left. A row
        with pictures and no mark is a text row: its pictures are `Tokens.unmarked`.
        Raises RowError where the conversation is malformed, marks and pictures differ, or the prompt does not fit.
        """
        messages = check_conversations(conversations)
        encoded = self._opening(messages)
        turns = [message for message in messages if message["role"] != "system"]
        marks = sum(turn["content"].count(IMAGE_MARK) for turn in turns)
        if encoded.images:
            raise RowError(f"{IMAGE_MARK} in the system message", "roles")
        if marks and marks != images:
            raise RowError(f"{marks} {IMAGE_MARK} marks for {images} images", "placeholders")
        if len(turns) == 1:
            raise RowError("the question has no answer", "no answer")
        answers, whole = len(turns) // 2, 0
        # Not strict: a last question without an answer teaches nothing, and goes with its pictures.
        for question, answer in zip(turns[::2], turns[1::2], strict=False):
            prompt = self._message("user", question["content"][:TEXT_LIMIT])
            reply = self._message("assistant", answer["content"][:TEXT_LIMIT])
            if len(encoded) + len(prompt) + len(reply) <= max_length:
                encoded += prompt
                encoded += reply
                whole += 1
                continue
            if not any(encoded.loss_mask):  # not even the first turn fits: keep the beginning of its answer
                encoded += prompt
                encoded += reply
                encoded = encoded.cut(max_length, self.tokens_per_image)
            break
        if not any(encoded.loss_mask):
            raise RowError(f"the prompt alone is longer than {max_length} tokens", "too long")
        encoded.answers, encoded.answers_cut = answers, answers - whole
        encoded.unmarked = 0 if marks else images
        return encoded

    def prompt(self, conversations: Any) -> Tokens:
        """What the model reads before it answers: all messages, and the start of the answer."""
        messages = check_conversations(conversations)
        encoded = self._opening(messages)
        for message in messages:
            if message["role"] != "system":
                encoded += self._message(message["role"], message["content"])
        encoded += self._encode(self.tokenizer.chat_layout.answer_start())
        return encoded

    def follow_up(self, question: str) -> Tokens:
        """A further question behind an answer that is complete, its end included, and the start of its answer."""
        encoded = self._message("user", question)
        encoded += self._encode(self.tokenizer.chat_layout.answer_start())
        return encoded

    def answer_end(self) -> Tokens:
        """What stands behind an answer."""
        return self._encode(self.tokenizer.chat_layout.answer_end())

    def _opening(self, messages: list[dict[str, str]]) -> Tokens:
        """The system message, if there is one: the conversation's own or the layout's."""
        own = messages[0]["role"] == "system"
        system = messages[0]["content"] if own else self.tokenizer.chat_layout.system_prompt
        opening = Tokens()
        if system is not None:
            if self._system[0] != system:
                self._system = system, self._message("system", system)
            opening += self._system[1]
        return opening

    def _message(self, role: str, content: str) -> Tokens:
        return self._encode(self.tokenizer.chat_layout.message(role, content))

    def _encode(self, pieces: list[Piece]) -> Tokens:
        tokens = Tokens()
        for piece in pieces:
            if piece.is_token:
                ids, starts, image_mask = [self.tokenizer.token_id(piece.text)], [0], [False]
            else:
                ids, starts, image_mask = self._encode_text(piece.text)
            tokens.input_ids += ids
            tokens.image_mask += image_mask
            begin = piece.supervised_from
            if begin is None:
                tokens.loss_mask += [False] * len(ids)
            else:
                tokens.loss_mask += [
                    start >= begin and not image for start, image in zip(starts, image_mask, strict=True)
                ]
            tokens.images += piece.text.count(IMAGE_MARK)
        return tokens

    def _encode_text(self, text: str) -> tuple[list[int], list[int], list[bool]]:
        """Ids of a text, the character each starts at, and which of them are patches.

        Marks become runs of placeholders and the whole is encoded at once; only the placeholders that a mark stands
        for are patches, never a user's own. Where the tokenizer would merge a placeholder with its neighbours, the
        texts between marks are encoded one by one instead, and so they are where the placeholder is a special token.
        """
        pieces, placeholder = text.split(IMAGE_MARK), self.tokenizer.chat_layout.placeholder
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


def check_conversations(conversations: Any) -> list[dict[str, str]]:
    """The messages of a row, if they are: system?, then user and assistant in turn. Raises RowError otherwise."""
    if not isinstance(conversations, list) or not conversations:
        raise RowError("`conversations` is not a list of messages", "conversations")
    if len(conversations) > MOST_MESSAGES:
        raise RowError(f"{len(conversations):,} messages; a row has at most {MOST_MESSAGES:,}", "too long")
    for number, message in enumerate(conversations, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RowError(f"message {number} has no text in `content`", "conversations")
        if message.get("role") not in ROLES:
            raise RowError(
                f"message {number} has the role {message.get('role')!r:.40}, not one of {', '.join(ROLES)}", "roles"
            )
    turns = conversations[1:] if conversations[0]["role"] == "system" else conversations
    if not turns or any(turn["role"] != ("user", "assistant")[n % 2] for n, turn in enumerate(turns)):
        raise RowError("user and assistant do not alternate", "roles")
    return conversations
