"""The row formats: each is converted to the one internal format.

The input is a row's fields, from any file. `FORMS`, at the end, lists the forms of conversation, in order;
`messages.py` reads messages, `cells.py` cells of pictures; `unread.py` refuses unsupported fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.rows.cells import records_of
from minimind_v.core.rows.field_names import ALTERNATIVES, CAPTIONS, FILE_NAMES, PICTURES, QUESTIONS, READ, TALKS
from minimind_v.core.rows.marks import filled_picture_field, place_pictures, row_pictures
from minimind_v.core.rows.messages import STANDARD, Conversation, has_messages, put_tools, read_messages
from minimind_v.core.rows.row import SEVERAL_ANSWERS, SEVERAL_CAPTIONS, Row, parse_json
from minimind_v.core.rows.unread import refuse_unread

MOST_IMAGES = 10_000  # of a row: 32768 positions hold fewer
DESCRIBE, DESCRIBE_CHINESE = "Describe this image.", "描述这张图片。"
_HAN, _LATIN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"), re.compile("[A-Za-z\u00c0-\u024f]+")


def read_row(fields: Mapping[str, Any]) -> Row:
    """Read a row from its fields. Raises RowError where they hold anything unsupported.

    A row without a conversation has None for it, which `check_form` refuses.
    """
    try:
        row = _read_fields(fields)
    except RecursionError:
        raise RowError("nested too deeply", "json") from None
    if len(row.images) > MOST_IMAGES:
        raise RowError(f"{len(row.images):,} images; a row has at most {MOST_IMAGES:,}", "image")
    return refuse_unread(row)


def _read_fields(fields: Mapping[str, Any]) -> Row:
    rest = dict(fields)
    read = next((read for matches, read in FORMS if matches(rest)), None)
    if read is None:
        conversation = Conversation(None, "")
        for key in TALKS:
            rest.pop(key, None)
    else:
        conversation = read(rest)
        _put_system(rest, conversation)
        put_tools(rest, conversation)
    key, pictures = row_pictures(rest, conversation)
    shown = place_pictures(conversation, pictures)
    if key and conversation.form:
        conversation.form = (
            f"{key} + {conversation.form}" if conversation.form in CAPTIONS else f"{conversation.form} + {key}"
        )
    images = [f"image {number}" if picture.name is None else picture.name for number, picture in enumerate(shown, 1)]
    inline = {position: picture.data for position, picture in enumerate(shown) if picture.data is not None}
    return Row(conversation.messages, images, rest, inline, tuple(conversation.notes), conversation.form)


def _put_system(fields: dict[str, Any], conversation: Conversation) -> None:
    """Put a field `system` (LLaMA-Factory) first, unless the conversation has a system message of its own."""
    text, messages = fields.get("system"), conversation.messages
    if isinstance(text, str) and text.strip() and isinstance(messages, list) and messages:
        first = messages[0]
        if isinstance(first, dict) and first.get("role") == "user":
            conversation.messages = [{"role": "system", "content": text}, *messages]
            del fields["system"]


def check_form(row: Row) -> Row:
    """Return the row. Raises RowError for one without a conversation."""
    if row.conversations is not None:
        return row
    for key in (*CAPTIONS, *(answer for answers in QUESTIONS.values() for answer in answers)):
        if key in row.extra and row.extra[key] in (None, "", []):
            raise RowError(f"`{key}` is empty", "conversations")
    names = ", ".join([*row.extra, *(["image"] if row.images else [])])
    raise RowError(f"no conversation in {names or 'an empty row':.300} — a row needs {READ}", "conversations")


# --- questions, answers and captions ----------------------------------------------------------------------------------


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


def _find_question(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """The fields of a question and of its answer."""
    for question, answers in QUESTIONS.items():
        if isinstance(fields.get(question), str):
            for answer in answers:
                if fields.get(answer) not in (None, "", []):
                    return question, answer
    return None


def has_question(fields: Mapping[str, Any]) -> bool:
    return _find_question(fields) is not None


def read_question(fields: dict[str, Any]) -> Conversation:
    """A question and its first answer, each in a field; the pictures go before them.

    `history` (ms-swift) may hold earlier turns.
    """
    keys = _find_question(fields)
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


# The forms of conversation, in order: whether a row's fields have the form, and how to read it. Reading removes the
# fields that it uses.
FORMS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[dict[str, Any]], Conversation]], ...] = (
    (has_messages, read_messages),
    (has_texts, read_texts),
    (has_question, read_question),
    (has_caption, read_caption),
)
