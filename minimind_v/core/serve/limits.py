"""What the server takes at most: sizes, numbers and seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of one server. All have sensible values; tests shorten them."""

    body: int = 32 << 20  # bytes of a request
    bodies: int = 256 << 20  # bytes of all requests that are being received or answered
    messages: int = 1000
    text: int = 1_000_000  # characters of all messages: many times what a context holds
    images: int = 16  # of one request
    image_bytes: int = 16 << 20  # of one picture file
    stops: int = 16
    stop_length: int = 256  # characters
    requests: int = 80  # accepted and not yet answered; an engine answers 16 of them (on a GPU 64), others wait
    preparing: int = 2  # requests whose images are decoded side by side
    fetching: int = 4  # remote images that are fetched side by side
    connections: int = 512
    models: int = 2  # loaded ones, beyond which the least recently used idle one is dropped
    read_seconds: float = 30.0  # for the headers of a request, and for each megabyte of its body
    write_seconds: float = 30.0  # a client that reads nothing for so long is gone
    keep_alive_seconds: float = 15.0
    answer_seconds: float = 300.0  # of a request, waiting included
    remote_seconds: float = 10.0  # for a remote image
    drain_seconds: float = 30.0  # for running answers after SIGTERM
