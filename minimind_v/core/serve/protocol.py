"""HTTP/1.1 as uvicorn speaks it, with limits for connections and for clients that are slow."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minimind_v.core.serve.errors import ApiError
from minimind_v.core.serve.limits import Limits

PROBE_SECONDS = 1.0  # between two looks for a client that sends no more


def make_protocol(limits: Limits) -> type[H11Protocol]:
    """The protocol of a server with these limits."""
    return type("LimitedProtocol", (Protocol,), {"limits": limits})


class Protocol(H11Protocol):
    """A connection. A request whose headers do not arrive in time, and a client that reads nothing, end it."""

    limits = Limits()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._headers, self._reading = Patience(self.limits.read_seconds), Patience(self.limits.write_seconds)
        self._probing: asyncio.TimerHandle | None = None  # while the client sends no more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection, or refuse it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(ApiError(503, "too many connections: try again later", code="too_many_connections"))
        else:
            self._headers.begin(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        self._headers.end()
        self._reading.end()
        if self._probing is not None:
            self._probing.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes of the client."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._headers.end()
        elif not self.transport.is_closing():
            self._headers.begin(self.transport)

    def on_response_complete(self) -> None:
        """A next request may begin."""
        self._headers.end()
        super().on_response_complete()
        if self._probing is not None and not self._is_owed:
            self.transport.close()

    @property
    def _is_owed(self) -> bool:
        """Whether a whole request has no whole answer yet."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. It is gone, or it still reads: then it gets the answers to its whole requests.

        In HTTP/1.0 nothing can be sent to find out: there it is gone.
        """
        if not self._is_owed or self.scope["http_version"] == "1.0":
            return False
        if self._probing is None:
            self._probing = self.loop.call_later(PROBE_SECONDS, self._probe)
        return True

    def _probe(self) -> None:
        """End a connection that the client has closed: it has refused what was sent, at first words without meaning."""
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        if self.conn.our_state is h11.SEND_RESPONSE:
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        self._probing = self.loop.call_later(PROBE_SECONDS, self._probe)

    def pause_writing(self) -> None:
        """The client reads slower than it is written to."""
        super().pause_writing()
        self._reading.begin(self.transport)

    def resume_writing(self) -> None:
        """The client has read."""
        self._reading.end()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        self._refuse(ApiError(400, "this is not a valid HTTP request"))

    def _refuse(self, error: ApiError) -> None:
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        events = (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        )
        with suppress(h11.LocalProtocolError):  # a response has begun already
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Patience:
    """Ends a connection some seconds after `begin`, unless `end` comes before."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, transport: asyncio.Transport) -> None:
        """Start to wait, unless that has begun before."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.seconds, transport.abort)

    def end(self) -> None:
        """Wait no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
