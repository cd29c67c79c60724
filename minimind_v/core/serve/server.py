"""Run the server: its socket, its signals, its access log."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from minimind_v.core.errors import RunError, UsageError, readable
from minimind_v.core.serve.app import make_app
from minimind_v.core.serve.limits import Limits
from minimind_v.core.serve.models import Models
from minimind_v.core.serve.pictures import Pictures
from minimind_v.core.serve.protocol import make_protocol
from minimind_v.core.serve.service import Service
from minimind_v.core.wording import plural

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
BACKLOG = 256


@dataclass(frozen=True)
class Settings:
    """What a server serves, where and to whom."""

    models: Sequence[Path]
    vision_model: Path | None = None
    tokenizer: Path | None = None
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key: str | None = None
    page: bool = True
    image_hosts: Sequence[str] = ()  # from which remote images are fetched: HOST, or HOST:PORT
    log_json: bool = False
    limits: Limits = field(default_factory=Limits)

    def check(self) -> None:
        """Raises UsageError for a key that nobody could give, and a server that others could use without one."""
        if self.api_key is not None and (not self.api_key or self.api_key != self.api_key.strip()):
            raise UsageError("--api-key is empty, or has spaces around it — give a key, or leave the option out")
        if not is_loopback(self.host) and not self.api_key:
            raise UsageError(f"--host {self.host} serves other machines — add --api-key, or set MMV_API_KEY")


@dataclass(frozen=True)
class Listener:
    """Receives what a server reports."""

    started: Callable[[str], None]  # its address
    message: Callable[[str], None]
    request: Callable[[str], None]  # a line of the access log


def serve(settings: Settings, listener: Listener) -> signal.Signals | None:
    """Serve until a signal, which is returned: the first lets running answers finish, the second ends at once.

    Raises UsageError, MissingInput, WeightsError, or RunError where the port is in use.
    """
    settings.check()
    with _listen(settings.host, settings.port) as endpoint:
        return asyncio.run(_serve(settings, endpoint, listener))


async def _serve(settings: Settings, endpoint: socket.socket, listener: Listener) -> signal.Signals | None:
    limits = settings.limits
    if settings.log_json:
        listener = replace(listener, message=lambda text: listener.request(_as_json({"message": text})))
    companions = settings.vision_model, settings.tokenizer
    models = Models(settings.models, *companions, settings.device, limits.models, listener.message)
    if len(models.entries) == 1:
        await models.preload()
    service = Service(models, limits, Pictures(limits, settings.image_hosts))
    hosts = (*LOOPBACK, settings.host.lower()) if is_loopback(settings.host) else None
    record = _as_json if settings.log_json else _as_line
    app = make_app(service, settings.api_key, hosts, settings.page, lambda fields: listener.request(record(fields)))
    config = uvicorn.Config(
        app, http=make_protocol(limits), ws="none", lifespan="off", log_config=None, log_level="critical",
        access_log=False, proxy_headers=False, server_header=False, backlog=BACKLOG, loop="asyncio",
        timeout_keep_alive=int(limits.keep_alive_seconds), timeout_graceful_shutdown=1,
    )  # fmt: skip
    address, port = endpoint.getsockname()[:2]
    url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
    server = Server(config, service, url, listener)
    try:
        await server.serve([endpoint])
    finally:
        models.close()
    return server.signal


class Server(uvicorn.Server):
    """uvicorn's server, which lets accepted requests finish before it ends."""

    def __init__(self, config: uvicorn.Config, service: Service, url: str, listener: Listener) -> None:
        super().__init__(config)
        self.service, self.url, self.listener = service, url, listener
        self.signal: signal.Signals | None = None
        self._end, self._reported = 0.0, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self.listener.started(self.url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self.signal is not None:
            os._exit(128 + sig)
        self.signal, self.service.draining = signal.Signals(sig), True
        self._end = time.monotonic() + self.service.limits.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, asked ten times a second."""
        if self.signal is None:
            return await super().on_tick(counter)
        accepted = self.service.metrics.accepted
        if accepted and not self._reported:
            self.listener.message(f"finishing {plural(accepted, 'answer')}; a second signal ends at once")
            self._reported = True
        return not accepted or time.monotonic() > self._end


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """The socket of an address. Raises RunError with the next step."""
    host = host.strip("[]")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        is_port = number in (errno.EADDRINUSE, errno.EACCES)
        reason = os.strerror(number) if is_port else getattr(error, "strerror", None) or str(error)
        option = "--port" if is_port else "--host or --port"
        raise RunError(f"the server cannot listen at {host}:{port} ({reason}) — choose another {option}") from None


def _as_json(fields: dict[str, Any]) -> str:
    return json.dumps({"time": time.time(), **fields}, ensure_ascii=True)


def _as_line(fields: dict[str, Any]) -> str:
    line = "{client} {method} {path} {status} {seconds:.3f} s".format(**fields)
    if "completion_tokens" in fields:
        line += f" {fields['model']} {fields['prompt_tokens']} + {fields['completion_tokens']} tokens"
    return readable(line + (f" ({fields['error']})" if "error" in fields else ""))
