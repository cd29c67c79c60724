"""`POST /v1/look`: the trace of an answer, one at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minimind_v.core.errors import MmvError, UsageError
from minimind_v.core.generate.engine import Engine, Prompt
from minimind_v.core.generate.trace import TraceSettings, trace_answer
from minimind_v.core.rows.row import IMAGE_MARK
from minimind_v.core.serve.answers import within
from minimind_v.core.serve.body import Body, parse
from minimind_v.core.serve.chat_request import ChatRequest, Fields, read_request
from minimind_v.core.serve.errors import ApiError, encode_json
from minimind_v.core.serve.limits import Limits
from minimind_v.core.serve.service import Service

OWN_FIELDS = frozenset({"answer", "occlude"})
# Fields of a chat completion that a trace has, too: it takes the likeliest tokens and is sent whole.
CHAT_FIELDS = frozenset({"model", "messages", "max_tokens", "max_completion_tokens", "think"})


class NotWaitedFor(Exception):
    """The client is gone, or its time is over."""


class Traces:
    """Traces answers in one thread, so that chats keep most of the machine."""

    def __init__(self, service: Service) -> None:
        self.service, self._thread = service, ThreadPoolExecutor(1, "look")

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the trace of an answer. Raises ApiError, or ClientGone."""
        await self.service.accept(scope, receive, lambda body: self._respond(body, scope, receive, send))

    async def _respond(self, body: Body, scope: Scope, receive: Receive, send: Send) -> None:
        service, stop = self.service, threading.Event()
        deadline = asyncio.get_running_loop().time() + service.limits.answer_seconds
        try:
            async with AsyncExitStack() as lent, within(deadline):
                request, settings = await service.prepare(lambda: read_look(parse(body), service.limits))
                name, model = await lent.enter_async_context(service.models.lend(request.model))
                scope["mmv"] |= {"model": name}
                prompt = await service.prompt(model, request)
                work = partial(_trace, model.engine, name, request, prompt, settings, stop)
                data = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            stop.set()
        await Response(data, media_type="application/json")(scope, receive, send)


def read_look(body: Any, limits: Limits) -> tuple[ChatRequest, TraceSettings]:
    """Check the JSON of a request. Raises ApiError with the field at fault."""
    request = read_request(body, limits, OWN_FIELDS)
    for name in body:
        if name not in OWN_FIELDS | CHAT_FIELDS and body[name] is not None:
            raise ApiError(400, f"a trace does not take {name}: leave it out", name, "unsupported_parameter")
    if not request.images:
        raise ApiError(400, "a trace needs an image in the messages", "messages")
    answer = Fields(body).text("answer")
    if answer is not None and len(answer) > limits.text:
        raise ApiError(400, f"the answer has more than {limits.text:,} characters", "answer")
    occlude = _read_patches(body.get("occlude"))
    try:
        return request, TraceSettings(answer=answer, max_new_tokens=request.max_new_tokens, occlude=occlude)
    except UsageError as error:
        raise ApiError(400, str(error), "answer") from None


def _read_patches(pairs: Any) -> Sequence[tuple[int, int]]:
    """Pairs of whole numbers, each once; whether there are such patches is checked later."""
    if pairs is None:
        return []
    good = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    if not good or not all(type(number) is int for pair in pairs for number in pair):
        raise ApiError(400, "occlude must be a list of pairs: the numbers of an image and a patch, from 0", "occlude")
    return list(dict.fromkeys((image, patch) for image, patch in pairs))


def _trace(
    engine: Engine, name: str, request: ChatRequest, prompt: Prompt, settings: TraceSettings, stop: threading.Event
) -> bytes:
    """The trace as JSON. Raises ApiError; ends soon after `stop` is set."""

    def check() -> None:
        if stop.is_set():
            raise NotWaitedFor

    question = request.messages[-1]["content"].replace(IMAGE_MARK, "").strip()
    try:
        check()
        trace = trace_answer(engine, prompt, settings, question, check)
    except MmvError as error:
        raise ApiError(400, str(error)) from None
    return encode_json(replace(trace, model=name).as_json())
