"""Conversations given as messages: a list, JSON text or a record of lists; contents are text or lists of items."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.rows.cells import BYTES_KEYS, NAME_KEYS, records_of
from minimind_v.core.rows.field_names import TALKS
from minimind_v.core.rows.row import ANSWER_FIRST, IMAGE_MARK, count_marks, parse_json
from minimind_v.core.rows.unread import KIND, named_in

STANDARD = ("system", "user", "assistant")
ROLES = {
    **dict.fromkeys(("user", "human", "usr", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "chatbot", "ai", "answer"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "tool_response"), "tool"),
}
CALLS = ("function_call", "tool_call")  # roles of messages that are calls of tools, as JSON
PART_TEXT = ("text", "input_text", "output_text")
PART_IMAGE = ("image", "image_url", "input_image", "image_path", "image_base64", "img")


@dataclass
class Conversation:
    """A conversation, and how it refers to its pictures."""

    messages: Any
    form: str
    image_refs: list[Any] | None = None  # of each mark: NEXT, an index, a name or data; None if all contents are text
    leads: bool = False  # without marks the pictures go before the first question
    needs: bool = False  # useless without a picture
    notes: list[str] = field(default_factory=list)


NEXT = object()  # refers to the next picture of the row


def conversation_key(fields: Mapping[str, Any]) -> str | None:
    """The field of the conversation: the first with a value, or the first that exists."""
    filled_keys = [key for key in TALKS if fields.get(key) is not None]
    return next((key for key in filled_keys if fields[key]), filled_keys[0] if filled_keys else None)


def has_messages(fields: Mapping[str, Any]) -> bool:
    return conversation_key(fields) is not None


def read_messages(fields: dict[str, Any]) -> Conversation:
    """`conversations` or `messages`: a list, its JSON text, or a record of lists; any other value as it is."""
    key = conversation_key(fields)
    assert key is not None
    value = fields[key]
    if isinstance(value, str | bytes) and value[:64].lstrip()[:1] in ("[", "{", b"[", b"{"):
        value = parse_json(value, f"`{key}` is ")
    fields[key] = records_of(value) if isinstance(value, dict) else value
    if conversation_key(fields) != key:  # the list is empty, and the other field is not
        return read_messages(fields)
    conversation = _messages(fields.pop(key), key)
    for other in TALKS:
        if fields.get(other, 0) is None:
            del fields[other]
    return conversation


def _messages(value: Any, form: str) -> Conversation:
    conversation = Conversation(value, form)
    if not isinstance(value, list):
        return conversation
    plain = True  # all contents are text
    messages = []
    for message in value:
        if type(message) is not dict or not (
            len(message) == 2 and message.get("role") in STANDARD and type(message.get("content")) is str
        ):
            message = _message(message)
            plain = plain and not (isinstance(message, dict) and isinstance(message.get("content"), list | dict))
        messages.append(message)
    conversation.messages = messages
    if not plain:
        conversation.form = f"{form} of parts"
        conversation.image_refs = []
        for number, message in enumerate(messages, 1):
            if isinstance(message, dict):
                conversation.image_refs += _join_items(message, number)
    _drop_answer(conversation)
    return conversation


def _message(message: Any) -> Any:
    """A message with standard names: `from` and `value` become `role` and `content`; null fields are dropped."""
    if not isinstance(message, dict):
        return message
    role_key = "role" if message.get("role") is not None else "from"
    text_key = "content" if message.get("content") is not None else "value"
    if role_key not in message and text_key not in message:
        return message
    role = message.get(role_key)
    rest = {
        key: value
        for key, value in message.items()
        if key not in ("role", "content", role_key, text_key) and value is not None
    }
    role = ROLES.get(role.strip().lower(), role) if isinstance(role, str) else role
    content = message.get(text_key)
    if role in CALLS:
        return {"role": "assistant", "content": None, "tool_calls": _calls(role, content)}
    return {"role": role, "content": content, **rest}


def _calls(role: str, content: Any) -> list[Any]:
    """The calls of a message with such a role: a call or a list of them, mostly as JSON text. Raises RowError."""
    calls = parse_json(content, f"a message of the role {role} is ") if isinstance(content, str) else content
    return calls if isinstance(calls, list) else [calls]


def put_tools(fields: dict[str, Any], conversation: Conversation) -> None:
    """Put a field `tools`, a list of objects or its JSON text, into the system message, unless that lists tools."""
    tools, messages = fields.get("tools"), conversation.messages
    if isinstance(tools, str) and tools.lstrip().startswith("["):
        with suppress(RowError):  # any text
            tools = parse_json(tools)
    are_tools = isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools)
    if not are_tools or not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        return
    if messages[0].get("role") != "system":
        messages = [{"role": "system", "content": None}, *messages]
    system = messages[0]
    if not system.get("tools") and "<tools>" not in str(system.get("content")):
        conversation.messages = [{**system, "tools": tools}, *messages[1:]]
        del fields["tools"]


def _drop_answer(conversation: Conversation) -> None:
    """Drop an answer without a question, as where a conversation begins with `gpt`."""
    messages = conversation.messages
    first = 1 if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system" else 0
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages[first : first + 2]]
    if roles == ["assistant", "user"]:
        content = messages[first].get("content")
        if conversation.image_refs is not None and isinstance(content, str):
            before = count_marks(messages[:first])
            del conversation.image_refs[before : before + content.count(IMAGE_MARK)]
        del messages[first]
        conversation.notes.append(ANSWER_FIRST)


def _join_items(message: dict[str, Any], number: int) -> list[Any]:
    """Join a message's items into one text with a mark for each picture; return the reference of each mark."""
    content = message.get("content")
    if isinstance(content, str):
        return [NEXT] * content.count(IMAGE_MARK)
    text, refs = "", []
    for item in content if isinstance(content, list) else [content]:
        piece, item_refs = _read_item(item, number)
        if text and piece and not (text[-1].isspace() or piece[0].isspace()):
            text += "\n"
        text += piece
        refs += item_refs
    message["content"] = text
    return refs


def _read_item(item: Any, number: int) -> tuple[str, list[Any]]:
    """The text of an item, which is a mark for a picture, and the references of its marks. Raises RowError."""
    if isinstance(item, str):
        return item, [NEXT] * item.count(IMAGE_MARK)
    if not isinstance(item, dict):
        raise RowError(f"message {number} has a part that is neither text nor an image", "conversations")
    filled = {key: value for key, value in item.items() if value not in (None, "", [], {})}
    kind = filled.get("type") or ("text" if isinstance(filled.get("text"), str) else next(iter(filled), None))
    kind = kind.lower() if isinstance(kind, str) else kind
    if kind in PART_TEXT and not any(key in filled for key in PART_IMAGE):
        text = filled.get("text", filled.get("content", ""))
        if not isinstance(text, str):
            raise RowError(f"message {number} has a text part without text", "conversations")
        return text, [NEXT] * text.count(IMAGE_MARK)
    own = next((filled[key] for key in NAME_KEYS if key in filled), None)
    own = filled if any(key in filled for key in BYTES_KEYS) else own
    index = filled.get("index")
    if kind not in PART_IMAGE or (own is None and index is None and any(True for _ in named_in(filled, ""))):
        raise RowError(
            f"message {number} has a part of type {kind!r:.40}, which is not supported — use text, image or image_url",
            KIND,
        )
    if own is None:
        own = index if isinstance(index, int) and not isinstance(index, bool) else NEXT
    return IMAGE_MARK, [own]
