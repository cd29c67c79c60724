"""The picture files of a request: the bytes behind a data URI, or behind an allowed address."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote_to_bytes

from minimind_v.core.hub.web import is_web
from minimind_v.core.rows.cells import decode_base64
from minimind_v.core.serve.errors import ApiError
from minimind_v.core.serve.limits import Limits
from minimind_v.core.serve.remote import fetch_image

DATA_URI = re.compile(r"data:(?P<type>[^,;]*)(?P<parameters>(;[^,;]*)*),", re.IGNORECASE)
HOW = "send the image as a data URI: data:image/png;base64,…"


class Pictures:
    """The picture files that the images of a request name."""

    def __init__(self, limits: Limits, hosts: Sequence[str] = ()) -> None:
        """`hosts`: those from which images are fetched."""
        self.limits, self.hosts = limits, hosts
        self._fetching = ThreadPoolExecutor(limits.fetching, "fetch")
        self._decoding = ThreadPoolExecutor(1, "base64")

    async def read(self, url: str) -> bytes:
        """The bytes of a picture file. Raises ApiError."""
        limits, loop = self.limits, asyncio.get_running_loop()
        if not is_web(url):
            return await loop.run_in_executor(self._decoding, picture_bytes, url, limits)
        if not self.hosts:
            raise ApiError(400, f"this server fetches no images: {HOW}", "messages", "remote_image_refused")
        return await loop.run_in_executor(
            self._fetching, fetch_image, url, self.hosts, limits.image_bytes, limits.remote_seconds
        )


def picture_bytes(url: str, limits: Limits) -> bytes:
    """The picture file in a data URI. Raises ApiError."""
    match = DATA_URI.match(url[:1000])
    if match is None:
        raise ApiError(
            400, f"an image is neither a data URI nor an allowed address: {HOW}", "messages", "invalid_image"
        )
    kind = match["type"].strip().lower()
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise ApiError(
            400, f"a data URI has the type {kind[:60]!r}, which is no image: {HOW}", "messages", "invalid_image"
        )
    if len(url) > limits.image_bytes * 4 // 3 + 1000:
        raise ApiError(413, f"an image is larger than {limits.image_bytes:,} bytes", "messages", "image_too_large")
    if "base64" not in match["parameters"].lower().split(";"):
        return unquote_to_bytes(url[match.end() :].encode("utf-8", "replace"))
    try:
        return decode_base64(unquote_to_bytes(url[match.end() :].encode("ascii", "replace")).decode("latin-1"))
    except ValueError:
        raise ApiError(
            400, f"the data URI of an image is not valid base64: {HOW}", "messages", "invalid_image"
        ) from None
