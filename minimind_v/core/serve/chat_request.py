"""From the JSON of a chat completion to a checked request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minimind_v.core.errors import nearest, shorten
from minimind_v.core.generate.settings import Sampling
from minimind_v.core.rows.row import IMAGE_MARK
from minimind_v.core.serve.errors import ApiError
from minimind_v.core.serve.limits import Limits

MAX_NEW_TOKENS = 512  # as `mmv chat`
MOST_LOGPROBS = 20  # as OpenAI
NO_EFFECT = frozenset({  # on the answer
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prediction",
})  # fmt: skip
# Fields that would change the answer, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "echo": (False,),
    "suffix": ("",),
}
COMPUTED = frozenset({
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "stop", "logprobs", "top_logprobs", "top_k", "min_p", "repetition_penalty", "think",
})  # fmt: skip
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ChatRequest:
    """A checked request. In the messages an `<image>` mark stands for each image, in order."""

    model: str | None  # None: the first model
    messages: list[dict[str, str]]
    images: list[str]  # their addresses: data URIs, or http(s) URLs
    sampling: Sampling
    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None  # the likeliest tokens that are listed with each token
    think: bool = False


def read_request(body: Any, limits: Limits, extra: frozenset[str] = frozenset()) -> ChatRequest:
    """Check the JSON of a chat completion; `extra` names further fields, which the caller reads.

    Raises ApiError with the field at fault.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    _refuse_fields(body, extra)
    fields = Fields(body)
    messages, images = read_messages(body.get("messages"), limits)
    stream = fields.flag("stream")
    options = body.get("stream_options")
    if options is not None and not (isinstance(options, dict) and stream):
        raise ApiError(400, "stream_options must be an object, and needs stream: true", "stream_options")
    longest = fields.whole("max_completion_tokens", 1) or fields.whole("max_tokens", 1)
    return ChatRequest(
        fields.text("model"),
        messages,
        images,
        _sampling(fields),
        longest or MAX_NEW_TOKENS,
        _stop(body.get("stop"), limits),
        stream,
        Fields(options or {}, "stream_options.").flag("include_usage"),
        _logprobs(fields),
        fields.flag("think"),
    )


class Fields:
    """The fields of an object by their type; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return bool(value)

    def number(self, name: str, lowest: float, highest: float) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
            raise self._wrong(name, f"a number from {lowest:g} to {highest:g}")
        return float(value)

    def whole(self, name: str, lowest: int, highest: int = 2**63 - 1) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            limit = f"of at least {lowest}" if highest == 2**63 - 1 else f"from {lowest} to {highest}"
            raise self._wrong(name, f"a whole number {limit}")
        return value

    def _wrong(self, name: str, kind: str) -> ApiError:
        name = self.prefix + name
        return ApiError(400, f"{name} must be {kind}", name)


def _refuse_fields(body: Mapping[str, Any], extra: frozenset[str]) -> None:
    for name, value in body.items():
        if name in COMPUTED or name in NO_EFFECT or name in extra or value is None:
            continue
        shown = shorten(name, 80)
        if name not in NEUTRAL:
            guess = nearest(name, COMPUTED) if len(name) < 80 else ""
            raise ApiError(400, f"unknown field {shown!r}{guess}", shown, "unknown_parameter")
        if isinstance(value, bool) != isinstance(next(iter(NEUTRAL[name]), None), bool) or value not in NEUTRAL[name]:
            neutral = f", or give {json.dumps(NEUTRAL[name][0])}" if NEUTRAL[name] else ""
            raise ApiError(
                400, f"this server does not support {name}: leave it out{neutral}", name, "unsupported_parameter"
            )


def _sampling(fields: Fields) -> Sampling:
    given: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.whole("top_k", 0, 10**9),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
    }
    if given["top_p"] == 0:  # the fewest tokens that hold any share: the likeliest one
        given["top_p"] = math.ulp(0.0)
    seed = fields.whole("seed", -(2**63))
    given["seed"] = None if seed is None else seed % 2**63
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def _stop(stop: Any, limits: Limits) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    good = isinstance(stops, list) and len(stops) <= limits.stops
    if not good or not all(isinstance(text, str) and 0 < len(text) <= limits.stop_length for text in stops):
        raise ApiError(
            400, f"stop must be a text, or a list of at most {limits.stops} texts, each of 1 to {limits.stop_length} "
            "characters", "stop",
        )  # fmt: skip
    return tuple(stops)


def _logprobs(fields: Fields) -> int | None:
    count = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if fields.flag("logprobs"):
        return count or 0
    if count:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    return None


# --- messages ---------------------------------------------------------------------------------------------------------


def read_messages(messages: Any, limits: Limits) -> tuple[list[dict[str, str]], list[str]]:
    """The messages with a role and a text each, user and assistant in turn, and the addresses of all images.

    An image mark stands for each image, as `mmv chat` sets them. Messages of the same role in a row become one.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    if len(messages) > limits.messages:
        raise ApiError(
            400, f"messages has {len(messages):,} messages; at most {limits.messages:,} are read", "messages"
        )
    plain: list[dict[str, str]] = []
    images: list[str] = []
    for number, message in enumerate(messages):
        at = f"messages[{number}]"
        role, content, addresses = _read_message(message, at)
        if role == "system" and plain and plain[-1]["role"] != "system":
            raise ApiError(400, f"{at}: a system message must come before all others", f"{at}.role")
        if role == "assistant" and (not plain or plain[-1]["role"] == "system"):
            raise ApiError(400, f"{at}: the first message after the system message must be the user's", f"{at}.role")
        images += addresses
        if plain and plain[-1]["role"] == role:
            plain[-1]["content"] += f"\n{content}"
        else:
            plain.append({"role": role, "content": content})
    if plain[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's", f"messages[{len(messages) - 1}].role")
    if (length := sum(len(message["content"]) for message in plain)) > limits.text:
        raise ApiError(400, f"the messages have {length:,} characters; at most {limits.text:,} are read", "messages",
                       "context_length_exceeded")  # fmt: skip
    if len(images) > limits.images:
        raise ApiError(400, f"the request has {len(images)} images; at most {limits.images} are read", "messages",
                       "too_many_images")  # fmt: skip
    return plain, images


def _read_message(message: Any, at: str) -> tuple[str, str, list[str]]:
    """The role, the text with its marks, and the addresses of the images."""
    if not isinstance(message, dict):
        raise ApiError(400, f"{at} must be an object with a role and a content", at)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        shown = shorten(role, 40) if isinstance(role, str) else role if role is None else type(role).__name__
        raise ApiError(400, f"{at}.role must be one of {', '.join(ROLES)}, not {shown!r}", f"{at}.role")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise ApiError(400, f"this server does not support {name}", f"{at}.{name}", "unsupported_parameter")
    content = message.get("content")
    if content is None and ("content" in message or role == "assistant"):
        content = ""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ApiError(400, f"{at}.content must be a text or a list", f"{at}.content")
    items = [_read_item(item, f"{at}.content[{number}]") for number, item in enumerate(content)]
    addresses = [text for is_image, text in items if is_image]
    if addresses and ROLES[role] != "user":
        raise ApiError(400, f"{at}: only the user's messages may have images", f"{at}.content")
    text = _with_marks(items)
    if ROLES[role] != "assistant" and (marks := text.count(IMAGE_MARK)) != len(addresses):
        raise ApiError(
            400, f"{at}: the text has {marks} {IMAGE_MARK} marks for {len(addresses)} images", f"{at}.content"
        )
    return ROLES[role], text, addresses


def _read_item(item: Any, at: str) -> tuple[bool, str]:
    """Whether an item of a content is an image, and its text or address."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind in ("text", "input_text", "refusal"):
        text = item.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise ApiError(400, f"{at}.text must be a text", f"{at}.text")
        return False, text
    if kind == "image_url":
        image = item.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if not isinstance(url, str) or not url:
            raise ApiError(400, f"{at}.image_url.url must be a data URI", f"{at}.image_url.url")
        return True, url
    raise ApiError(400, f"{at}.type must be text or image_url", f"{at}.type")


def _with_marks(items: list[tuple[bool, str]]) -> str:
    """The text of a message. Its own marks stay; else images come first, or each where it stands between texts."""
    texts = [text for is_image, text in items if not is_image]
    images = len(items) - len(texts)
    if any(IMAGE_MARK in text for text in texts):
        return "\n".join(texts)
    if len(texts) <= 1:
        return f"{IMAGE_MARK}\n" * images + "".join(texts)
    return "\n".join(IMAGE_MARK if is_image else text for is_image, text in items)
