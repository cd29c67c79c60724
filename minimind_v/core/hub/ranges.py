"""Read parts of a file on a hub with HTTP range requests."""

from __future__ import annotations

import io
import re
import time
from typing import Any
from urllib.parse import urlsplit

from minimind_v.core.hub.remote import RETRIED, TRIES, Hub, HubError, Unreachable, http, pause, plain, refused

AHEAD = 1 << 18  # bytes of a request, at least


class RangeFile(io.RawIOBase):
    """The bytes of `url`, fetched when they are read; the last piece is kept. `transferred` counts the bytes.

    Raises HubError if the server has no ranges, reports another size than the listing, or stops answering.
    """

    def __init__(self, hub: Hub, url: str, name: str, size: int) -> None:
        self.hub, self.url, self.name, self.size = hub, url, name, size
        self.transferred = 0
        self._at = 0
        self._piece, self._piece_at = b"", 0
        self._direct: str | None = None  # the address after redirects, used until it refuses (signatures expire)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self.size)
        count = max(stop - self._at, 0)
        if count:
            self.hold(self._at, stop)
            buffer[:count] = self._piece[self._at - self._piece_at : stop - self._piece_at]
            self._at = stop
        return count

    def hold(self, start: int, stop: int) -> None:
        """Fetch the bytes from `start` to `stop`."""
        have = self._piece_at + len(self._piece)
        if start < self._piece_at or start > have:
            self._piece, self._piece_at, have = b"", start, start
        if stop > have:
            until = min(max(stop, have + AHEAD), self.size)
            self._piece = self._piece[start - self._piece_at :] + self._get(have, until)
            self._piece_at = start

    def _get(self, start: int, stop: int) -> bytes:
        trouble = ""
        for attempt in range(TRIES):
            wait = pause(attempt)
            try:
                answer = self._ask(start, stop)
            except (http().HTTPError, ConnectionError, TimeoutError) as error:
                trouble = plain(error)
            else:
                if answer.status_code == 206:
                    return self._checked(answer, start, stop)
                if answer.status_code in (401, 403) and self._direct:
                    self._direct, wait = None, 0
                elif answer.status_code in RETRIED:
                    wait, trouble = pause(attempt, answer.headers), f"HTTP {answer.status_code}"
                    if wait is None or attempt == TRIES - 1:
                        raise refused(answer.status_code, self.hub, self.name)
                elif answer.status_code == 200:
                    raise HubError(
                        f"{self.hub.endpoint} delivers {self.name} only as a whole, so a sample is not possible — "
                        "leave out --sample, or use another --endpoint"
                    )
                else:
                    raise refused(answer.status_code, self.hub, self.name)
            time.sleep(wait or 0)
        raise Unreachable(
            f"{self.name} from {self.hub.endpoint}: {trouble}, {TRIES} times — run the same command again"
        )

    def _ask(self, start: int, stop: int) -> Any:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        url = self._direct or self.url
        headers = self.hub.headers() | {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
        if urlsplit(url).netloc != urlsplit(self.url).netloc:
            headers.pop("Authorization", None)
            headers.pop("authorization", None)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
            if answer.status_code == 206:
                answer.read()  # another status may stand before a body of gigabytes
                self.transferred += len(answer.content)
                self._direct = str(answer.url)
            return answer

    def _checked(self, answer: Any, start: int, stop: int) -> bytes:
        given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
        data: bytes = answer.content
        if not given or int(given[1]) != start or given[3] not in ("*", str(self.size)) or len(data) != stop - start:
            raise HubError(f"{self.name} from {self.hub.endpoint}: the answer has other bytes than requested")
        return data
