"""Answers in OpenAI's form, whole or as server-sent events, from the events of an engine."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from minimind_v.core.errors import MmvError
from minimind_v.core.generate.detokenize import SplitStream
from minimind_v.core.generate.engine import Engine, Event, Prompt, Request
from minimind_v.core.generate.sampling import Sampler
from minimind_v.core.serve.chat_request import ChatRequest
from minimind_v.core.serve.errors import ApiError, encode_json
from minimind_v.core.serve.metrics import Metrics
from minimind_v.core.serve.token_list import TokenList

END = b"data: [DONE]\n\n"


@asynccontextmanager
async def within(deadline: float) -> AsyncIterator[None]:
    """Raises ApiError where the block takes longer than until a time of the event loop."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise ApiError(503, "the answer took too long and was stopped", code="timeout", retry_after=10) from None


class Running:
    """A request that an engine answers, until its end or `cancel`."""

    def __init__(self, engine: Engine, prompt: Prompt, request: ChatRequest, deadline: float) -> None:
        """`deadline` is a time of the event loop."""
        events, loop = asyncio.Queue[Event](), asyncio.get_running_loop()
        self._deadline, self._events = deadline, events

        # In the engine's thread. It does not know this object, which knows the answer: a circle would keep keys and
        # values until the next full collection.
        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        sampler = Sampler(request.sampling)
        self._answer = engine.submit(
            Request(prompt, sampler, request.max_new_tokens, request.stop, request.logprobs), deliver
        )

    async def events(self) -> list[Event]:
        """All events since the last call, at least one. Raises ApiError for an error of the answer, or no time."""
        async with within(self._deadline):
            events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        for event in events:
            if event.error is not None:
                raise _failure(event.error) from event.error
        return events

    def cancel(self) -> None:
        """Free the row of an answer that has not ended."""
        self._answer.cancel()


def _failure(error: Exception) -> ApiError:
    if isinstance(error, MmvError):
        return ApiError(400, str(error))
    return ApiError(500, "the answer failed; the server's log says why", code="internal_error")


class Completion:
    """One answer as it grows: the text, the reasoning, the tokens."""

    def __init__(self, name: str, request: ChatRequest, prompt: Prompt, engine: Engine, metrics: Metrics) -> None:
        self.request, self.prompt, self.metrics = request, prompt, metrics
        self.tokens, self.finish_reason = 0, ""
        self._token_list = TokenList(engine.tokenizer)
        self._split = SplitStream(request.think)
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self._begin = time.perf_counter()

    def take(self, event: Event) -> tuple[list[tuple[bool, str]], list[dict[str, Any]]]:
        """The texts of an event, each with whether it is reasoning, and the tokens that are complete with it."""
        if event.token is not None:
            if not self.tokens:
                self.metrics.first_token.add(time.perf_counter() - self._begin)
            self.tokens += 1
            self.metrics.completion_tokens += 1
        texts = self._split.add(event.text)
        if event.end is not None:
            texts += self._split.rest()
            self.finish_reason = "length" if event.end == "length" else "stop"
        return texts, self._token_list.add(event)

    def whole(self, texts: list[tuple[bool, str]], tokens: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer as one object."""
        message: dict[str, Any] = {"role": "assistant", "content": _join(texts, False), "refusal": None}
        if self.request.think:
            message["reasoning_content"] = _join(texts, True)
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": self.finish_reason,
        }
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self.usage(), **self._notice()}

    def first_chunk(self) -> dict[str, Any]:
        """The chunk before any text."""
        return self._chunk({"role": "assistant", "content": ""}) | self._notice()

    def chunks(self, texts: list[tuple[bool, str]], tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The chunks of an event."""
        deltas = [{"reasoning_content" if is_reasoning else "content": text} for is_reasoning, text in texts if text]
        if tokens and not deltas:
            deltas = [{"content": ""}]
        return [self._chunk(delta, None if number or not tokens else tokens) for number, delta in enumerate(deltas)]

    def last_chunks(self) -> list[dict[str, Any]]:
        """The chunk with the reason of the end, and that with the usage where it was asked for."""
        chunks = [self._chunk({}, None, self.finish_reason)]
        if self.request.include_usage:
            chunks.append(chunks[0] | {"choices": [], "usage": self.usage()})
        return chunks

    def usage(self) -> dict[str, int]:
        """Numbers of tokens."""
        read = len(self.prompt.tokens)
        return {"prompt_tokens": read, "completion_tokens": self.tokens, "total_tokens": read + self.tokens}

    def _chunk(
        self, delta: dict[str, Any], tokens: list[dict[str, Any]] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": reason}
        usage: dict[str, Any] = {"usage": None} if self.request.include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}

    def _notice(self) -> dict[str, Any]:
        dropped = self.prompt.dropped_turns
        return {"mmv": {"dropped_turns": dropped}} if dropped else {}

    def _logprobs(self, tokens: list[dict[str, Any]] | None) -> dict[str, Any] | None:
        return (
            {"content": tokens, "refusal": None} if self.request.logprobs is not None and tokens is not None else None
        )


def sse(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + encode_json(value) + b"\n\n"


def _join(texts: list[tuple[bool, str]], reasoning: bool) -> str:
    return "".join(text for is_reasoning, text in texts if is_reasoning == reasoning)
