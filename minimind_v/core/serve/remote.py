"""Fetch an image from an allowed host, and from no other: no redirects, no private addresses, in bounded time."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import SplitResult, quote, urlsplit

from minimind_v.core.serve.errors import ApiError

PORTS = {"http": 80, "https": 443}
PIECE = 1 << 16


def fetch_image(url: str, allowed: Sequence[str], most_bytes: int, seconds: float) -> bytes:
    """The bytes at an http(s) address whose host (`HOST` or `HOST:PORT`) is in `allowed`. Raises ApiError.

    A name must not stand for a private address; only a host that is named by such an address, or as localhost, may
    have it. The connection goes to the address that was checked.
    """
    address = _split(url)
    host, port = (address.hostname or "").lower(), address.port or PORTS[address.scheme]
    names = {f"{host}:{port}", *([host] if port == PORTS[address.scheme] else [])}
    if not names & {name.lower() for name in allowed}:
        raise _refused("images are not fetched from this host: send the image as a data URI")
    connection = _connect(host, port, address.scheme == "https", seconds)
    timer = threading.Timer(seconds, _break_off, [connection.sock])  # which the connection may forget
    timer.start()
    try:
        target = quote(address.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{address.query}" if address.query else "")
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "mmv"})
        response = connection.getresponse()
        if response.status != 200:
            hint = "; redirects are not followed" if 300 <= response.status < 400 else ""
            raise _refused(f"the host of an image answered with status {response.status}{hint}")
        data = bytearray()
        while piece := response.read(PIECE):
            data += piece
            if len(data) > most_bytes:
                raise ApiError(413, f"an image is larger than {most_bytes:,} bytes", "messages", "image_too_large")
        return bytes(data)
    except (OSError, http.client.HTTPException, ValueError):
        raise _refused("the image could not be fetched from its host") from None
    finally:
        timer.cancel()
        connection.close()


def _split(url: str) -> SplitResult:
    try:
        address = urlsplit(url)
        good = address.scheme in PORTS and address.hostname and address.username is None and address.port != 0
    except ValueError:
        good = False
    if not good or not url.isascii() or any(character <= " " for character in url):
        raise _refused("the address of an image is not a plain http or https URL")
    return address


def _connect(host: str, port: int, secure: bool, seconds: float) -> http.client.HTTPConnection:
    connection: http.client.HTTPConnection
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [address for entry in entries if _may_have(host, address := str(entry[4][0]))]
        if not addresses:
            raise _refused("the host of an image has a private address")
        plain = socket.create_connection((addresses[0], port), timeout=seconds)
        if secure:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port, timeout=seconds, context=context)
            connection.sock = context.wrap_socket(plain, server_hostname=host)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=seconds)
            connection.sock = plain
        return connection
    except (OSError, UnicodeError):
        raise _refused("the host of an image cannot be reached") from None


def _may_have(host: str, address: str) -> bool:
    """Whether a host may stand for an address: a public one, or the one that it names itself."""
    resolved = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(resolved, ipaddress.IPv6Address) and resolved.ipv4_mapped:
        resolved = resolved.ipv4_mapped
    if resolved.is_global and not resolved.is_multicast:
        return True
    try:
        return ipaddress.ip_address(host) == ipaddress.ip_address(address)
    except ValueError:
        return host == "localhost" and resolved.is_loopback


def _break_off(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)


def _refused(message: str) -> ApiError:
    return ApiError(400, message, "messages", "invalid_image")
