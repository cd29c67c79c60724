"""The routes of the server, and what stands before all of them: hosts, keys, headers, the access log."""

from __future__ import annotations

import asyncio
import hmac
import mimetypes
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind_v.core.pages.frame import ASSETS
from minimind_v.core.serve.body import ClientGone
from minimind_v.core.serve.errors import ApiError, Json
from minimind_v.core.serve.examples import examples
from minimind_v.core.serve.look import Traces
from minimind_v.core.serve.service import Service
from minimind_v.core.version import __version__

PAGE = Path(__file__).with_name("page")
VIEWER = ("look.js", "look.css")  # in the assets of all pages
# A page may show images that were dropped on it, and fetches from this server only.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": POLICY,
}
GONE = 499  # the status in logs and metrics of a client that did not wait
DRAIN_SECONDS = 1.0  # for the rest of a body that is not read
Record = Callable[[dict[str, Any]], None]  # takes the fields of a line of the access log


def make_app(
    service: Service, api_key: str | None, hosts: Sequence[str] | None, with_page: bool, record: Record
) -> ASGIApp:
    """The application. `hosts` are the names that a Host header may have; None: any. `record` gets each request."""

    async def models(request: Request) -> Response:
        return Json({"object": "list", "data": await service.models.list()})

    async def model(request: Request) -> Response:
        entry = service.models.find(request.path_params["name"])
        return Json(next(item for item in await service.models.list() if item["id"] == entry.name))

    async def health(request: Request) -> Response:
        if service.draining:
            raise ApiError(503, "the server is ending", code="shutting_down", retry_after=5)
        return Json({"status": "ok", "version": __version__})

    async def metrics(request: Request) -> Response:
        text = service.metrics.text(service.models.loaded)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    routes: list[BaseRoute] = [
        Route("/v1/chat/completions", Endpoint(service.chat), methods=["POST"]),
        Route("/v1/look", Endpoint(Traces(service).respond), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    router = Router(routes + (page_routes(service) if with_page else []), redirect_slashes=False)
    return Guard(router, service, api_key, hosts, record)


class Endpoint:
    """An ASGI application of a function, which a route calls as it is."""

    def __init__(self, function: ASGIApp) -> None:
        self.function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the function."""
        await self.function(scope, receive, send)


class WholeFile(FileResponse):
    """A file that is sent whole, also to those who ask for a part of it: all are small."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; a Range header of any form is ignored, as RFC 9110 (14.2) permits."""
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


def page_routes(service: Service) -> list[BaseRoute]:
    """The page, its files, those of the viewer that looks inside a model, and examples."""
    mimetypes.add_type("text/javascript", ".js")  # not what the system's table may say

    def file(path: Path) -> Callable[[Request], Any]:
        async def respond(request: Request) -> Response:
            if not path.is_file():
                raise HTTPException(404)
            return WholeFile(path, headers={"cache-control": "no-cache", "accept-ranges": "none"})

        return respond

    async def list_examples(request: Request) -> Response:
        chosen = examples() if await service.models.any_demo() else {}
        return Json({
            "examples": [
                {"image": f"/page/examples/{name}", "question": question, "answer": answer}
                for name, (_, question, answer) in chosen.items()
            ]
        })  # fmt: skip

    async def example(request: Request) -> Response:
        if request.path_params["name"] not in examples():
            raise HTTPException(404)
        return Response(examples()[request.path_params["name"]][0], media_type="image/png")

    files = {path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*") if path.is_file()}
    files |= {name: ASSETS / name for name in VIEWER}
    return [
        Route("/", file(PAGE / "index.html")),
        Route("/v1/examples", list_examples),
        Route("/page/examples/{name}", example),
        *(Route(f"/page/{name}", file(path)) for name, path in files.items()),
    ]


def http_error(error: HTTPException) -> Response:
    """An error of the router, in OpenAI's form."""
    messages = {404: "there is nothing at this address", 405: "this method is not allowed here"}
    response = ApiError(error.status_code, messages.get(error.status_code, error.detail)).response()
    response.headers.update(error.headers or {})
    return response


class Guard:
    """What every request passes: the check of host and key, security headers, the access log, unexpected errors."""

    def __init__(
        self, app: ASGIApp, service: Service, api_key: str | None, hosts: Sequence[str] | None, record: Record
    ) -> None:
        self.app, self.service, self.hosts, self.record = app, service, hosts, record
        self.api_key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        scope["app"] = self  # so that the router raises errors
        scope["mmv"], begin = {}, time.perf_counter()
        exchange = Exchange(scope, receive, send, 2 * self.service.limits.body)
        try:
            self._check(scope)
            await self.app(scope, exchange.receive, exchange.send)
        except ClientGone:
            exchange.status = exchange.status or GONE
            scope["mmv"]["error"] = "the client is gone"
        except Exception as error:
            response = self._response(error)
            if not exchange.status:
                await response(scope, exchange.receive, exchange.send)
        finally:
            self._record(scope, exchange.status, time.perf_counter() - begin)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if has_two_lengths(headers):
            raise ApiError(400, "a request has either Content-Length or Transfer-Encoding, not both")
        host = headers.get("host", "").lower()
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
        if self.hosts is not None and name and name not in self.hosts:
            raise ApiError(403, "the Host header does not name this server", code="host_not_allowed")
        if self.api_key is not None and (scope["path"].startswith("/v1/") or scope["path"] == "/metrics"):
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self.api_key):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _response(self, error: Exception) -> Response:
        if isinstance(error, ApiError):
            self.service.report(error)
            return error.response()
        if isinstance(error, HTTPException):
            return http_error(error)
        self.service.report(error)
        return ApiError(500, "the request failed; the server's log says why", code="internal_error").response()

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = route.path if isinstance(route, Route) else "other"
        self.service.metrics.requests[path, status] += 1
        client = scope.get("client") or ("", 0)
        path = scope["raw_path"].decode("latin-1")
        self.record({
            "client": client[0], "method": scope["method"], "path": path, "status": status,
            "seconds": round(seconds, 4), **scope["mmv"],
        })  # fmt: skip


def has_two_lengths(headers: Headers) -> bool:
    """Whether a request gives the length of its body in two ways."""
    return "content-length" in headers and "transfer-encoding" in headers


class Exchange:
    """One request and its response: adds the headers of every response, and reads a body that nobody else reads."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        """`most`: bytes that are read of a body that nobody else reads."""
        self._most = most
        headers = Headers(scope=scope)
        self._receive, self._send, self.status = receive, send, 0
        self._has_more = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self._waits = "expect" in headers  # for our word before it sends
        self._is_last = has_two_lengths(headers)  # what follows may be a request that a proxy took for a body

    async def receive(self) -> Message:
        """The next piece of the request."""
        self._waits = False
        message = await self._receive()
        self._most -= len(message.get("body", b""))
        self._has_more = self._has_more and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a piece of the response."""
        if message["type"] == "http.response.start":
            self.status, headers = message["status"], MutableHeaders(raw=list(message["headers"]))
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
            if self._has_more and not self._waits:  # a client that is still sending would not read the response
                await self._read_rest()
            if self._has_more or self._is_last:
                headers["connection"] = "close"
            message = {**message, "headers": headers.raw}
        await self._send(message)

    async def _read_rest(self) -> None:
        begin = time.perf_counter()
        while self._has_more and self._most > 0 and (left := DRAIN_SECONDS - (time.perf_counter() - begin)) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self.receive()
