"""A real `mmv serve` and what asks it."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
from pathlib import Path
from typing import Any

from openai import OpenAI

from tests.cli import harness
from tests.cli.harness import ASSETS, EYE, SIGHT

QUESTION = "What do you see?"


class Server:
    """The installed `mmv serve` at a free port; `model` defaults to weights that can be talked to."""

    def __init__(self, folder: Path, *args: object, model: Path | None = None, prepare: Any = None) -> None:
        options = ["--model", model or harness.sighted(), *SIGHT, "--port", 0, *args]
        self.running = harness.Running(folder, "serve", *options, prepare=prepare)
        self.running.until(lambda: "serving at http://" in self.running.err)
        self.host, port = re.search(r"serving at http://(\S+):(\d+)", self.running.err).groups()
        self.port = int(port)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> str:
        return self.running.err

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Response:
        """One request; a body that is neither bytes nor text is sent as JSON."""
        if body is not None and not isinstance(body, bytes | str):
            body = json.dumps(body)
        given = {"content-type": "application/json"} if body is not None else {}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body.encode() if isinstance(body, str) else body, given | named)
            response = connection.getresponse()
            return Response(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def chat(self, content: Any = QUESTION, **fields: Any) -> Response:
        """A short greedy answer to one question."""
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 12} | fields
        return self.request("POST", "/v1/chat/completions", body)

    def answer(self, content: Any = QUESTION, **fields: Any) -> str:
        response = self.chat(content, **fields)
        assert response.status == 200, response.body
        return response.json["choices"][0]["message"]["content"]

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=60)

    def metric(self, name: str) -> float:
        return float(re.search(rf"^{name} (\S+)$", self.request("GET", "/metrics").body.decode(), re.M)[1])

    def end(self) -> None:
        if self.running.alive:
            self.running.process.poll()
            harness.os.killpg(self.running.pid, harness.signal.SIGKILL)
            self.running.wait()


class Response:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, {name.lower(): value for name, value in headers.items()}, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error; fails where it is not in OpenAI's form, or says more than it may."""
        error = self.json["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        assert error["message"]
        assert "\n" not in error["message"]
        assert "Traceback" not in error["message"]
        assert not re.search(r"(^|\s)/\w+/", error["message"])
        return error


def image_item(data: bytes, kind: str = "image/jpeg") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def text_item(text: str = QUESTION) -> dict[str, Any]:
    return {"type": "text", "text": text}


def raw_request(body: bytes, *headers: str) -> bytes:
    """A chat request as bytes, with a length unless the headers have another form."""
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    if not any(header.lower().startswith(("transfer-encoding", "content-length")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


__all__ = ["ASSETS", "EYE", "QUESTION", "Response", "Server", "image_item", "raw_request", "text_item"]
