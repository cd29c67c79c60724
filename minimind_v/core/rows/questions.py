"""Conversations given as questions and answers, or as a caption of the row's picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.rows.cells import records_of
from minimind_v.core.rows.field_names import ALTERNATIVES, CAPTIONS, FILE_NAMES, PICTURES, QUESTIONS
from minimind_v.core.rows.marks import filled_picture_field
from minimind_v.core.rows.messages import STANDARD, Conversation
from minimind_v.core.rows.row import SEVERAL_ANSWERS, SEVERAL_CAPTIONS, parse_json

DESCRIBE, DESCRIBE_CHINESE = "Describe this image.", "描述这张图片。"
_HAN, _LATIN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"), re.compile("[A-Za-z\u00c0-\u024f]+")


def read_texts(fields: dict[str, Any]) -> Conversation:
    """`texts` of user and assistant (the_cauldron, nanoVLM); the pictures go before all of it."""
    value = fields.pop("texts")
    messages: list[dict[str, Any]] = []
    for turn in records_of(value) if isinstance(value, dict) else value:
        if not isinstance(turn, dict) or not isinstance(turn.get("user"), str):
            raise RowError("`texts` is not a list of user and assistant", "conversations")
        if turn.get("system") and not messages:
            messages.append({"role": "system", "content": turn["system"]})
        messages.append({"role": "user", "content": turn["user"]})
        messages.append({"role": "assistant", "content": turn.get("assistant")})
    return Conversation(messages, "texts", leads=True)


def has_texts(fields: Mapping[str, Any]) -> bool:
    texts = fields.get("texts")
    if isinstance(texts, dict):
        return isinstance(texts.get("user"), list)
    return isinstance(texts, list) and bool(texts) and isinstance(texts[0], dict) and "user" in texts[0]


def find_question(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    for question, answers in QUESTIONS.items():
        if isinstance(fields.get(question), str):
            for answer in answers:
                if fields.get(answer) not in (None, "", []):
                    return question, answer
    return None


def read_question(fields: dict[str, Any]) -> Conversation:
    """A question and its first answer, each in a field; the pictures go before them.

    `history` (ms-swift) may hold earlier turns.
    """
    keys = find_question(fields)
    assert keys is not None
    question, answer = (fields.pop(key) for key in keys)
    text, several = _first_text(answer, keys[1])
    turns = [*_turns_before(fields), (question, text)]
    messages = [
        {"role": role, "content": content} for turn in turns for role, content in zip(STANDARD[1:], turn, strict=True)
    ]
    return Conversation(messages, " + ".join(keys), leads=True, notes=[SEVERAL_ANSWERS] if several else [])


def _turns_before(fields: dict[str, Any]) -> list[Any]:
    """The questions and answers of `history`; a plain text there is a note, not a turn. Raises RowError."""
    turns = fields.get("history")
    if isinstance(turns, str) and turns.startswith("["):
        turns = parse_json(turns, "`history` is ")
    if not isinstance(turns, list):
        return []
    del fields["history"]
    for turn in turns:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowError("`history` must be a list of pairs of a question and its answer", "conversations")
    return turns


def _caption_key(fields: Mapping[str, Any]) -> str | None:
    return next((key for key in CAPTIONS if fields.get(key) and isinstance(fields[key], str | list)), None)


def has_caption(fields: Mapping[str, Any]) -> bool:
    return _caption_key(fields) is not None and (
        filled_picture_field(fields, (*PICTURES, *ALTERNATIVES)) is not None
        or any(name.endswith(FILE_NAMES) for name in fields)
    )


def read_caption(fields: dict[str, Any]) -> Conversation:
    """A picture and its first caption: the answer to a request to describe the picture."""
    key = _caption_key(fields)
    assert key is not None
    text, several = _first_text(fields.pop(key), key)
    chinese = len(_HAN.findall(text)) > len(_LATIN.findall(text))
    question = DESCRIBE_CHINESE if chinese else DESCRIBE
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return Conversation(messages, key, leads=True, needs=True, notes=[SEVERAL_CAPTIONS] if several else [])


def _first_text(value: Any, key: str) -> tuple[str, bool]:
    """The first text of a value, and whether there are more. Raises RowError."""
    texts = value if isinstance(value, list) else [value]
    first = texts[0] if texts else None
    if isinstance(first, dict):  # as VQA has its answers
        first = next((first[name] for name in (key.removesuffix("s"), "answer", "raw", "text") if name in first), None)
    if isinstance(first, int | float):
        raise RowError(f"`{key}` is the number {first:.12g} — write it as text", "conversations")
    if not isinstance(first, str):
        raise RowError(f"`{key}` must be a text or a list of texts", "conversations")
    return first, len(texts) > 1
