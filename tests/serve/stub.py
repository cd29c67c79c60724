"""A server that speaks the page's language and answers as a test says: what a real one does seldom or too quickly."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tests.serve.page_actions import scene

PAGE = Path(__file__).parents[2] / "minimind_v" / "core" / "serve" / "page"
HEADERS = {"Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'"}
ABILITIES = {
    "loaded": True,
    "thinks": True,
    "images": True,
    "context": 4096,
    "stage": "sft",
    "parameters": 26_100_000,
    "generation": "3v",
    "tokens_per_image": 64,
}


class Stub:
    """What the server does next, and what it was asked: tests set the fields while it runs."""

    def __init__(self) -> None:
        self.models = {"tiny": ABILITIES}
        self.answer = "A small red circle at the top left."
        self.reasoning = ""
        self.held: int | None = None  # an answer waits before this word, until a test sets another
        self.busy = 0  # requests that are refused with 429 before one is answered
        self.key = ""
        self.failures = 0  # lists of models that end with an error before one is given
        self.dropped_turns = 0
        self.finish = "stop"
        self.error = ""  # an error in the middle of the answer
        self.breaks = False  # the answer breaks off
        self.examples: list[dict[str, str]] = []
        self.viewer = ""  # the module that shows what a model did; the server has none without it
        self.requests: list[dict[str, Any]] = []  # for answers, and for looking inside

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", lambda request: FileResponse(PAGE / "index.html", headers=HEADERS)),
                Route("/page/examples/scene.png", lambda request: Response(scene(), media_type="image/png")),
                Route("/health", lambda request: JSONResponse({"status": "ok", "version": "0"})),
                Route("/v1/models", self.list_models),
                Route("/v1/examples", lambda request: JSONResponse({"examples": self.examples})),
                Route("/page/look.js", self.look_module),
                Route("/page/look.css", lambda request: Response("", media_type="text/css")),
                Route("/v1/look", self.look, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Mount("/page", StaticFiles(directory=PAGE)),
            ]
        )

    async def list_models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return refusal(401, "the API key is missing or wrong")
        if self.failures:
            self.failures -= 1
            return refusal(500, "the list of models failed")
        data = [{"id": name, "object": "model", "mmv": abilities} for name, abilities in self.models.items()]
        return JSONResponse({"object": "list", "data": data})

    async def look_module(self, request: Request) -> Response:
        return Response(self.viewer, 200 if self.viewer else 404, media_type="text/javascript")

    async def look(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        return JSONResponse({"answer": body.get("answer", "another answer"), "occlude": body.get("occlude")})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if body["model"] not in self.models:
            return refusal(404, f"the model {body['model']!r} does not exist")
        if self.busy:
            self.busy -= 1
            return refusal(429, "the queue is full", {"Retry-After": "1"})
        return StreamingResponse(self.stream(), media_type="text/event-stream")

    async def stream(self) -> AsyncIterator[str]:
        first = {"mmv": {"dropped_turns": self.dropped_turns}} if self.dropped_turns else {}
        yield event(delta={"role": "assistant"}, **first)
        for word in self.reasoning.split():
            yield event(delta={"reasoning_content": f"{word} "})
        words = self.answer.split(" ")
        for number, word in enumerate(words):
            while number == self.held:
                await asyncio.sleep(0.01)
            if number == len(words) // 2 and (self.breaks or self.error):
                if self.error:
                    yield f"data: {json.dumps({'error': {'message': self.error}})}\n\n"
                return
            yield event(delta={"content": f" {word}" if number else word})
        yield event(delta={}, finish_reason=self.finish)
        usage = {"prompt_tokens": 80, "completion_tokens": len(words), "total_tokens": 80 + len(words)}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def event(delta: dict[str, str], finish_reason: str | None = None, **extra: Any) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice], **extra})}\n\n"


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    error = {"message": message, "type": "error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


class Running:
    """A stub that listens on a port of its own, in a thread; `stop` and `start` as often as a test needs."""

    def __init__(self, stub: Stub, port: int = 0) -> None:
        self.stub, self.port = stub, port
        self.start()

    def start(self) -> None:
        config = uvicorn.Config(
            self.stub.app(), port=self.port, log_level="critical", lifespan="off", timeout_graceful_shutdown=0
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            threading.Event().wait(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"
