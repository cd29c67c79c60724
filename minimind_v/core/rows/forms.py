"""The row formats: each is converted to the one internal format.

The input is a row's fields, from any file. `FORMS` lists the forms of conversation, in order; `cells.py` reads cells of
pictures; `unread.py` refuses unsupported fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.rows.cells import StoredPictures
from minimind_v.core.rows.field_names import CAPTIONS, PICTURES, QUESTIONS, READ, TALKS
from minimind_v.core.rows.marks import place_pictures, row_pictures
from minimind_v.core.rows.messages import (
    STANDARD,
    Conversation,
    conversation_is,
    conversation_key,
    read_json,
    read_lists,
    read_messages,
)
from minimind_v.core.rows.questions import (
    find_question,
    has_caption,
    has_texts,
    read_caption,
    read_question,
    read_texts,
)
from minimind_v.core.rows.row import IMAGE_MARK, Row, image_names, parse_json
from minimind_v.core.rows.unread import refuse_unread

MOST_IMAGES = 10_000  # of a row: 32768 positions hold fewer
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_DATA = ("data:", "/9j/", "iVBOR", "R0lG", "UklGR")


@dataclass(frozen=True)
class Form:
    """A form of conversation: whether a row's fields have it, and how to read it; `read` removes the fields it uses."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    read: Callable[[dict[str, Any]], Conversation]


def read_row(fields: Mapping[str, Any]) -> Row:
    """Read a row from its fields. Raises RowError where they hold anything unsupported.

    A row without a conversation has None for it; its user raises `no_form`.
    """
    text = fields.get("conversations")
    if type(text) is str and text.startswith("["):
        fields = {**fields, "conversations": parse_json(text, "`conversations` is ")}
    try:
        row = _usual_row(fields) or _read_fields(fields)
    except RecursionError:
        raise RowError("nested too deeply", "json") from None
    if len(row.images) > MOST_IMAGES:
        raise RowError(f"{len(row.images):,} images; a row has at most {MOST_IMAGES:,}", "image")
    return refuse_unread(row)


def _read_fields(fields: Mapping[str, Any]) -> Row:
    rest = dict(fields)
    form = next((form for form in FORMS if form.matches(rest)), None)
    if form is None:
        conversation = Conversation(None, "")
        for key in TALKS:
            rest.pop(key, None)
    else:
        conversation = form.read(rest)
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


def _usual_row(fields: Mapping[str, Any]) -> Row | None:
    """Read a row in the forms of published data, quickly; None for any other form, which takes longer to read."""
    key = "conversations" if "conversations" in fields else "messages"
    messages = fields.get(key)
    if type(messages) is not list or not messages or "system" in fields:
        return None
    if key == "conversations" and "messages" in fields:
        return None
    try:
        if "from" in messages[0]:
            messages = [
                {"role": _LLAVA_ROLES[message["from"]], "content": message["value"]}
                for message in messages
                if len(message) == 2 or _LLAVA_ROLES[""]  # no more keys, or a KeyError
            ]
        marks = 0
        for message in messages:
            text = message["content"]
            if len(message) != 2 or message["role"] not in STANDARD or type(text) is not str:
                return None
            marks += text.count(IMAGE_MARK)
    except (KeyError, TypeError, AttributeError):
        return None
    first = messages[messages[0]["role"] == "system" and len(messages) > 1]
    if first["role"] == "assistant" or (marks > 1 and len(messages) > 2):
        return None
    extra = dict(fields)
    del extra[key]
    images: list[str] = []
    inline: dict[int, Any] = {}
    form = key
    for name in PICTURES:
        if name not in extra:
            continue
        if form != key:  # two fields of pictures
            return None
        value, form = extra.pop(name), f"{key} + {name}"
        if type(value) is str and "://" not in value and not value.startswith(_DATA):
            images = image_names(value)
        elif isinstance(value, StoredPictures):
            images = [f"picture {number}" for number in range(1, (marks or value.count()) + 1)]
            inline = dict(enumerate(range(len(images))))
        elif value is not None:
            return None
    if marks and not images:
        return None
    return Row(messages, images, extra, inline, (), form if images else key)


def no_form(row: Row) -> RowError:
    """The error for a row without a conversation."""
    for key in (*CAPTIONS, *(answer for answers in QUESTIONS.values() for answer in answers)):
        if key in row.extra and row.extra[key] in (None, "", []):
            return RowError(f"`{key}` is empty", "conversations")
    names = ", ".join([*row.extra, *(["image"] if row.images else [])])
    return RowError(f"no conversation in {names or 'an empty row':.300} — a row needs {READ}", "conversations")


FORMS = (
    Form("messages", conversation_is(list), read_messages),
    Form("JSON text of messages", conversation_is(str, bytes), read_json),
    Form("struct of lists", conversation_is(dict), read_lists),
    Form("no messages", lambda fields: conversation_key(fields) is not None, read_messages),
    Form("texts", has_texts, read_texts),
    Form("question + answer", lambda fields: find_question(fields) is not None, read_question),
    Form("image + caption", has_caption, read_caption),
)
