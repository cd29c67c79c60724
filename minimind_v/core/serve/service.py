"""What a server does: it accepts chat requests, prepares their prompts and sends the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
from starlette.types import Receive, Scope, Send

from minimind_v.core.errors import MmvError, RowError
from minimind_v.core.generate.engine import Engine, Prompt, PromptTooLong
from minimind_v.core.serve.answers import END, Completion, Running, sse, within
from minimind_v.core.serve.body import Bodies, Body, ClientGone, parse, until_gone
from minimind_v.core.serve.chat_request import ChatRequest, read_request
from minimind_v.core.serve.errors import ApiError, Json
from minimind_v.core.serve.limits import Limits
from minimind_v.core.serve.metrics import Metrics
from minimind_v.core.serve.models import Model, Models
from minimind_v.core.serve.pictures import Pictures

T = TypeVar("T")
EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]


class Service:
    """The models, the queue and the numbers of one server."""

    def __init__(self, models: Models, limits: Limits, pictures: Pictures) -> None:
        self.models, self.limits, self.pictures = models, limits, pictures
        self.metrics, self.bodies = Metrics(), Bodies(limits)
        self.draining = False  # whether no new requests are accepted
        self._preparing = ThreadPoolExecutor(limits.preparing, "prepare")

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a chat completion. Raises ApiError before anything was sent, or ClientGone."""
        begin = time.perf_counter()
        await self.accept(scope, receive, lambda body: self._chat(body, scope, send))
        self.metrics.total.add(time.perf_counter() - begin)

    async def accept(self, scope: Scope, receive: Receive, work: Callable[[Body], Coroutine[Any, Any, None]]) -> None:
        """Read the body of a request and await `work` on it. Raises ApiError, or ClientGone when the client leaves.

        A request that is accepted is answered, also while the server ends.
        """
        self._check_room()
        body = await self.bodies.read(scope, receive)
        try:
            with self._accepted():
                await until_gone(receive, work(body))
        finally:
            self.bodies.forget(body)

    def _check_room(self) -> None:
        """Raises ApiError where no further request is accepted."""
        if self.draining:
            raise ApiError(503, "the server is ending", code="shutting_down", retry_after=5)
        if self.metrics.accepted >= self.limits.requests:
            raise ApiError(429, "the queue is full: try again later", code="queue_full", retry_after=1)

    @contextmanager
    def _accepted(self) -> Iterator[None]:
        """Count a request as accepted."""
        self._check_room()
        self.metrics.accepted += 1
        try:
            yield
        except ClientGone:
            self.metrics.cancelled += 1
            raise
        finally:
            self.metrics.accepted -= 1

    def report(self, error: Exception) -> None:
        """Write to the log what a client is not told."""
        cause = error.__cause__ if isinstance(error, ApiError) else error
        if cause is not None:
            self.models.log(f"a request failed: {type(cause).__name__}: {cause}")

    async def prepare(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in one of a few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, function, *arguments)

    async def _chat(self, body: Body, scope: Scope, send: Send) -> None:
        deadline = asyncio.get_running_loop().time() + self.limits.answer_seconds
        async with AsyncExitStack() as lent:
            async with within(deadline):
                request = await self.prepare(lambda: read_request(parse(body), self.limits))
                name, model = await lent.enter_async_context(self.models.lend(request.model))
                prompt = await self.prompt(model, request)
            self.bodies.forget(body)
            completion = Completion(name, request, prompt, model.engine, self.metrics)
            scope["mmv"] |= {"model": name, "prompt_tokens": len(prompt.tokens)}
            self.metrics.prompt_tokens += len(prompt.tokens)
            self.metrics.answering += 1
            running = Running(model.engine, prompt, request, deadline)
            try:
                await (self._stream if request.stream else self._whole)(running, completion, scope, send)
            finally:
                running.cancel()
                self.metrics.answering -= 1
                scope["mmv"]["completion_tokens"] = completion.tokens

    async def prompt(self, model: Model, request: ChatRequest) -> Prompt:
        """The prompt of a request, its images decoded. Raises ApiError."""
        if request.think and not model.description["thinks"]:
            raise ApiError(400, "this model does not reason: leave out think", "think", "unsupported_parameter")
        pixels = []
        for number, url in enumerate(request.images, 1):  # one at a time: a client that leaves ends the rest
            which = f"image {number}" if len(request.images) > 1 else "the image"
            pixels.append(await self.prepare(decode_image, model.engine, await self.pictures.read(url), which))
        return await self.prepare(encode_messages, model.engine, request, pixels)

    async def _whole(self, running: Running, completion: Completion, scope: Scope, send: Send) -> None:
        texts: list[tuple[bool, str]] = []
        tokens: list[dict[str, Any]] = []
        while not completion.finish_reason:
            for event in await running.events():
                new_texts, new_tokens = completion.take(event)
                texts += new_texts
                tokens += new_tokens
        await Json(completion.whole(texts, tokens))(scope, _nothing, send)

    async def _stream(self, running: Running, completion: Completion, scope: Scope, send: Send) -> None:
        first = await running.events()  # an error until then has a status of its own
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        await _write(send, sse(completion.first_chunk()))
        try:
            events = first
            while True:
                chunks = [chunk for event in events for chunk in completion.chunks(*completion.take(event))]
                if completion.finish_reason:
                    break
                if chunks:
                    await _write(send, b"".join(map(sse, chunks)))
                events = await running.events()
            await _write(send, b"".join(map(sse, [*chunks, *completion.last_chunks()])) + END)
        except ApiError as error:
            self.report(error)
            scope["mmv"]["error"] = error.code or error.message
            await _write(send, sse(error.as_json()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def decode_image(engine: Engine, data: bytes, which: str) -> np.ndarray:
    """A picture file as the model takes it, uint8 [3, S, S]. Raises ApiError."""
    try:
        return engine.processor.pixels(data)
    except RowError as error:
        reason = str(error).removeprefix("the image: ")
        raise ApiError(400, f"{which}: {reason}", "messages", "invalid_image") from None


def encode_messages(engine: Engine, request: ChatRequest, pixels: list[np.ndarray]) -> Prompt:
    """The prompt of a request with these images. Raises ApiError."""
    try:
        return engine.prompt(request.messages, pixels, request.max_new_tokens, request.think)
    except PromptTooLong as error:
        raise ApiError(400, str(error), "messages", "context_length_exceeded") from None
    except MmvError as error:
        raise ApiError(400, str(error), "messages") from None


async def _write(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _nothing() -> Any:
    raise AssertionError("the request was read")
