"""Read the body of a request within its limits, and notice when a client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from minimind_v.core.serve.errors import ApiError
from minimind_v.core.serve.limits import Limits

MEGABYTE = 1 << 20


class ClientGone(Exception):
    """The client has closed its connection."""


@dataclass
class Body:
    """A body, and its share of the memory of all."""

    data: bytearray
    bytes: int = 0


class Bodies:
    """The bodies in memory, so that their sum stays bounded."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.bytes = limits, 0

    async def read(self, scope: Scope, receive: Receive) -> Body:
        """The whole body, which counts until `forget`. Raises ApiError, or ClientGone."""
        headers, limits = Headers(scope=scope), self.limits
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "the body must not be compressed")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON: send the header content-type: application/json")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limits.body:
            raise self._too_large()
        body, more, begin = Body(bytearray()), True, asyncio.get_running_loop().time()
        try:
            while more:
                async with asyncio.timeout_at(begin + limits.read_seconds * (1 + body.bytes // MEGABYTE)):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece, more = message.get("body", b""), message.get("more_body", False)
                body.data += piece
                body.bytes += len(piece)
                self.bytes += len(piece)
                if body.bytes > limits.body:
                    raise self._too_large()
                if self.bytes > limits.bodies:
                    raise ApiError(429, "the server is receiving too much at once", code="queue_full", retry_after=1)
        except TimeoutError:
            self.forget(body)
            raise ApiError(408, "the body of the request arrived too slowly", code="timeout") from None
        except BaseException:
            self.forget(body)
            raise
        return body

    def forget(self, body: Body) -> None:
        """A body, and what was read from it, is needed no longer."""
        self.bytes -= body.bytes
        body.data, body.bytes = bytearray(), 0

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.limits.body:,} bytes", code="request_too_large")


def parse(body: Body) -> Any:
    """The JSON of a body. Raises ApiError."""
    try:
        return json.loads(body.data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except RecursionError:
        raise ApiError(400, "the JSON of the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON ({str(error)[:200]})") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, whose request was read; it is cancelled when the client closes the connection: ClientGone."""
    job, gone = asyncio.create_task(work), asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((job, gone), return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGone
        await job
    finally:
        for task in (job, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
        del job, gone, task  # which have an error whose traceback has this frame: a circle would keep the request


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
