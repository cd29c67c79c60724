"""A web server on this machine for tests: it serves one content at every address but those that end with a trouble."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENDLESS = 100_000  # blocks of a content that does not end by itself


class Handler(BaseHTTPRequestHandler):
    """Answers by the end of the path: /none, /moved, /endless, /large, /slow, /cut, or the content."""

    content = b""
    agents: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.agents.append(self.headers["User-Agent"])
        trouble = self.path.rpartition("/")[2]
        if trouble == "none":
            self.send_error(404)
            return
        self.send_response(302 if trouble == "moved" else 200)
        if trouble == "moved":
            self.send_header("Location", "/picture.jpg")
            self.send_header("Content-Length", "0")
        elif trouble == "large":
            self.send_header("Content-Length", str(10**12))
        elif trouble == "cut":
            self.send_header("Content-Length", str(len(self.content) + 10))
        elif trouble not in ("endless", "slow"):
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):  # the client has had enough
            self._write(trouble)

    def _write(self, trouble: str) -> None:
        if trouble == "endless":
            for _ in range(ENDLESS):
                self.wfile.write(bytes(1 << 16))
        elif trouble == "slow":
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif trouble not in ("moved", "large"):
            self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(content: bytes) -> Iterator[tuple[str, type[Handler]]]:
    """The address of a file with this content, and the handler, which notes what it is asked."""
    handler = type("ContentHandler", (Handler,), {"content": content, "agents": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/picture.jpg", handler
    finally:
        server.shutdown()
        server.server_close()
