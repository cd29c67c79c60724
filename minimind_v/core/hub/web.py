"""The content of one address that a user named, within bounds of bytes and time."""

from __future__ import annotations

import re
import time

from minimind_v.core.errors import MissingInput, shorten
from minimind_v.core.hub.remote import http
from minimind_v.core.version import __version__

WEB = re.compile(r"https?://", re.IGNORECASE)
MOST_BYTES = 64 << 20
SECONDS = 60.0  # for the whole content
SILENCE = 15.0  # seconds without a byte


def is_web(name: str) -> bool:
    """Whether a name is an address that `fetch` takes."""
    return bool(WEB.match(name))


def fetch(address: str, most_bytes: int = MOST_BYTES, seconds: float = SECONDS) -> bytes:
    """Return the content of an http or https address, behind redirects. Raises MissingInput with the reason."""
    shown, client = shorten(address, 120), http()
    end = time.monotonic() + seconds
    content = bytearray()
    try:
        headers = {"User-Agent": f"mmv/{__version__}", "Accept": "image/*,*/*;q=0.5"}
        with client.stream("GET", address, follow_redirects=True, timeout=SILENCE, headers=headers) as response:
            if response.status_code != 200:
                reason = f"HTTP {response.status_code} {response.reason_phrase}".strip()
                raise MissingInput(f"{shown}: the server answered {reason} — check the address")
            if int(response.headers.get("Content-Length", "0") or 0) > most_bytes:
                raise _too_large(shown, most_bytes)
            for block in response.iter_bytes():
                content += block
                if len(content) > most_bytes:
                    raise _too_large(shown, most_bytes)
                if time.monotonic() > end:
                    raise MissingInput(f"{shown}: not received within {seconds:.0f} s — download the file first")
    except (client.HTTPError, client.InvalidURL, ValueError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise MissingInput(f"{shown}: not received ({reason}) — check the address and the network") from None
    return bytes(content)


def _too_large(shown: str, most_bytes: int) -> MissingInput:
    return MissingInput(f"{shown}: more than {most_bytes >> 20} MB — download the file and shrink the image")
