"""The row formats: each is converted to the one internal format.

The input is a row's fields, from any file. `FORMS` lists the forms of conversation, in order; `cells.py` reads cells of
pictures; `unread.py` refuses unsupported fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.rows.field_names import CAPTIONS, QUESTIONS, READ, TALKS
from minimind_v.core.rows.marks import place_pictures, row_pictures
from minimind_v.core.rows.messages import Conversation, has_messages, read_messages
from minimind_v.core.rows.questions import (
    find_question,
    has_caption,
    has_texts,
    read_caption,
    read_question,
    read_texts,
)
from minimind_v.core.rows.row import Row
from minimind_v.core.rows.unread import refuse_unread

MOST_IMAGES = 10_000  # of a row: 32768 positions hold fewer
# The forms of conversation, in order: whether a row's fields have the form, and how to read it. Reading removes the
# fields that it uses.
FORMS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[dict[str, Any]], Conversation]], ...] = (
    (has_messages, read_messages),
    (has_texts, read_texts),
    (lambda fields: find_question(fields) is not None, read_question),
    (has_caption, read_caption),
)


def read_row(fields: Mapping[str, Any]) -> Row:
    """Read a row from its fields. Raises RowError where they hold anything unsupported.

    A row without a conversation has None for it; its user raises `no_form`.
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
    key, pictures = row_pictures(rest, conversation)
    shown = place_pictures(conversation, pictures)
    if key and conversation.form:
        conversation.form = (
            f"{key} + {conversation.form}" if conversation.form in CAPTIONS else f"{conversation.form} + {key}"
        )
    images = [f"picture {number}" if picture.name is None else picture.name for number, picture in enumerate(shown, 1)]
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


def no_form(row: Row) -> RowError:
    """The error for a row without a conversation."""
    for key in (*CAPTIONS, *(answer for answers in QUESTIONS.values() for answer in answers)):
        if key in row.extra and row.extra[key] in (None, "", []):
            return RowError(f"`{key}` is empty", "conversations")
    names = ", ".join([*row.extra, *(["image"] if row.images else [])])
    return RowError(f"no conversation in {names or 'an empty row':.300} — a row needs {READ}", "conversations")
