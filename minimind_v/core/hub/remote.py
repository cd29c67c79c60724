"""The interface of a hub: a listing of a repository, and an address for each of its files.

HubError                  a hub does not give a file: refused, missing, damaged, out of order
└── Unreachable           the hub does not answer
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from minimind_v.core.errors import MmvError

TRIES = 5  # requests for one thing without a byte of progress between them
FIRST_PAUSE = 0.5  # seconds, doubled each time
LONGEST_PAUSE = 60.0  # seconds; a hub that asks for more is left alone
RETRIED = (408, 425, 429, 500, 502, 503, 504)


class HubError(MmvError):
    """A hub does not give a file."""


class Unreachable(HubError):
    """The hub does not answer."""


class NotThere(HubError):
    """The hub has no such repository, revision or file."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit. Fields that the hub does not give are None."""

    path: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None  # of the blob, for files that git holds itself


@dataclass(frozen=True)
class Listing:
    """A repository at one commit (the name of the revision, where the hub has no commits)."""

    commit: str
    files: dict[str, RemoteFile]


class Hub(Protocol):
    """A hub at an address."""

    name: str
    endpoint: str

    def listing(self, repo: str, kind: str, revision: str, names: Iterable[str]) -> Listing:
        """Every file of a repository, or those of `names` if the hub has no listing. Raises HubError."""
        ...

    def complete(self, repo: str, kind: str, commit: str, file: RemoteFile) -> RemoteFile:
        """The same file with size and digests, as far as the hub gives them. Raises HubError."""
        ...

    def url(self, repo: str, kind: str, commit: str, path: str) -> str: ...

    def headers(self) -> dict[str, str]:
        """Headers for requests to `endpoint`. They must not follow a redirect to another host."""
        ...

    def login(self) -> str:
        """The next step of a user who may read a repository that is not public."""
        ...


def http() -> Any:
    """The HTTP library that the installed huggingface_hub uses: httpx2, or httpx before its version 2."""
    return importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")


def refused(status: int, hub: Hub, what: str) -> HubError:
    """The error for a failed request, with the next step."""
    where = f"{what} ({hub.endpoint}, HTTP {status})"
    if status in (401, 403):
        return HubError(
            f"access refused to {where}: it is gated or private — accept its terms on the hub, then {hub.login()}"
        )
    if status in (404, 410):
        return NotThere(f"not found: {where} — check --revision, or whether the mirror has it")
    if status == 429:
        return HubError(f"too many requests for {where} — wait and run the same command again, or {hub.login()}")
    return HubError(f"the hub failed on {where} — run the same command again later, or use --endpoint")


def pause(attempt: int, response_headers: Any = None) -> float | None:
    """Seconds to wait before attempt `attempt` + 1, as the hub requires; None if that is too long."""
    asked = (response_headers or {}).get("Retry-After", "")
    if asked.isdigit():
        return float(asked) if float(asked) <= LONGEST_PAUSE else None
    return min(FIRST_PAUSE * 2.0**attempt, 8.0)


def patiently(ask: Callable[[], Any], hub: Hub, what: str) -> Any:
    """The answer to a request, repeated a few times while the hub is busy.

    Raises Unreachable without an answer, HubError for an error of the hub.
    """
    for attempt in range(TRIES):
        try:
            response = ask()
        except http().TimeoutException:
            if attempt == 1:
                raise Unreachable(f"{hub.endpoint}: no answer in time") from None
            continue
        except (http().HTTPError, OSError) as error:
            raise Unreachable(f"{hub.endpoint}: {reason_of(error)}") from None
        if response.status_code < 400:
            return response
        wait = pause(attempt, response.headers)
        if response.status_code not in RETRIED or wait is None or attempt == TRIES - 1:
            raise refused(response.status_code, hub, what)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def reason_of(error: BaseException) -> str:
    """An error of the network in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
