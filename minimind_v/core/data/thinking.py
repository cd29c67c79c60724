"""Messages with reasoning and tools as plain messages, in the words of minimind-3v's chat template."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.rows.row import parse_json

THINK, END_THINK = "<think>", "</think>"
EMPTY_BLOCK = f"{THINK}\n\n{END_THINK}\n\n"
TAGS = (THINK, END_THINK, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
CALLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def plain_messages(conversation: list[Any]) -> list[Any]:
    """A conversation whose messages have a role and a content only; what is no message stays as it is.

    An answer's content begins with its think block; the answers of several tools in turn are one message of the role
    `tool`; the tools that the system message lists are in its content. Raises RowError for lists that are none.
    """
    messages: list[Any] = []
    for are_responses, group in groupby(enumerate(conversation, 1), lambda pair: _is_response(pair[1])):
        if are_responses:
            responses = (f"\n<tool_response>\n{message['content']}\n</tool_response>" for _, message in group)
            messages.append({"role": "tool", "content": "".join(responses)})
        else:
            messages += [_plain(message, number) for number, message in group]
    return messages


def _is_response(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "tool" and isinstance(message.get("content"), str)


def _plain(message: Any, number: int) -> Any:
    if not isinstance(message, dict):
        return message
    role, content = message.get("role"), message.get("content")
    if role == "assistant":
        content = _answer(message, number)
    elif role == "system" and number == 1:
        content = _system(message)
    return {"role": role, "content": content}


def split_reasoning(content: str) -> tuple[str, str]:
    """The reasoning and the answer of a content; no reasoning without `</think>`."""
    if END_THINK not in content:
        return "", content
    reasoning = content.split(END_THINK)[0].rstrip("\n").split(THINK)[-1].lstrip("\n")
    return reasoning, content.split(END_THINK)[-1].lstrip("\n")


def split_answer(text: str) -> tuple[str, str]:
    """The reasoning and the answer of a generated text, whose prompt opened the think block.

    A text that ends within its reasoning has no answer.
    """
    reasoning, _, answer = text.partition(END_THINK)
    return reasoning.strip("\n"), answer.lstrip("\n")


def _answer(message: dict[str, Any], number: int) -> Any:
    content, reasoning = message.get("content"), message.get("reasoning_content")
    calls = _objects(message, "tool_calls", number)
    if not isinstance(content, str):
        if content is not None or not calls:
            return content  # no text, as the check of the messages reports
        content = ""
    if not isinstance(reasoning, str):
        reasoning, content = split_reasoning(content)
    reasoning, content = reasoning.strip("\n"), content.lstrip("\n")
    text = f"{THINK}\n{reasoning}\n{END_THINK}\n\n{content}"
    for index, call in enumerate(calls):
        function = call.get("function")
        text += "\n" * bool(content or index) + _call(function if isinstance(function, dict) else call)
    return text


def _call(call: dict[str, Any]) -> str:
    arguments = call.get("arguments")
    text = arguments if isinstance(arguments, str) else _json(arguments)
    return f'<tool_call>\n{{"name": "{call.get("name", "")}", "arguments": {text}}}\n</tool_call>'


def _system(message: dict[str, Any]) -> Any:
    content, tools = message.get("content"), _objects(message, "tools", 1)
    if not tools or not isinstance(content, str | None):
        return content
    lines = "".join(f"\n{_json(tool)}" for tool in tools)
    return ("" if content is None else f"{content}\n\n") + TOOLS + lines + CALLS


def _objects(message: dict[str, Any], key: str, number: int) -> list[dict[str, Any]]:
    """The list of objects in a field of a message, which may be JSON text; empty without one. Raises RowError."""
    value = message.get(key)
    if isinstance(value, str) and value:
        value = parse_json(value, f"message {number}: `{key}` is ")
    value = value or []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"message {number}: `{key}` is not a list of objects", "conversations")
    return value


def _json(value: Any) -> str:
    """JSON text. Raises RowError for a value that JSON cannot hold, such as the bytes or the date of a table."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"a tool is not JSON ({error})", "json") from None
