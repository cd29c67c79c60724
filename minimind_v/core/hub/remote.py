"""What a hub is to the rest: it lists a repository, and has an address for each of its files.

HubError                  a hub cannot give what is asked for: refused, not there, damaged, in trouble
└── Unreachable           nothing that speaks for the hub answers
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
    """A hub cannot give what is asked for."""


class Unreachable(HubError):
    """Nothing that speaks for the hub answers."""


class NotThere(HubError):
    """The hub has no such repository, revision or file."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit. What the hub does not tell is None."""

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
        """Every file of a repository; of a hub that gives files but lists none, those of `names` that it has.

        Raises HubError.
        """
        ...

    def complete(self, repo: str, kind: str, commit: str, file: RemoteFile) -> RemoteFile:
        """The same file with all that the hub knows of it. Raises HubError."""
        ...

    def url(self, repo: str, kind: str, commit: str, path: str) -> str: ...

    def headers(self) -> dict[str, str]:
        """For requests to `endpoint`; who is redirected to another host must not send them there."""
        ...

    def login(self) -> str:
        """What somebody does who may see a repository that is not public."""
        ...


def http() -> Any:
    """The HTTP library that the installed huggingface_hub uses: httpx2, or httpx before its version 2."""
    return importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")


def refused(status: int, hub: Hub, what: str) -> HubError:
    """The error for an answer that is none, in words that say what to do."""
    where = f"{what} ({hub.endpoint}, HTTP {status})"
    if status in (401, 403):
        return HubError(
            f"access refused to {where}: gated or private — accept its terms on the hub, then {hub.login()}"
        )
    if status in (404, 410):
        return NotThere(f"not found: {where} — check --revision, or whether the mirror has it")
    if status == 429:
        return HubError(f"too many requests for {where} — wait and run the same command again, or {hub.login()}")
    return HubError(f"the hub is in trouble over {where} — run the same command again later, or use --endpoint")


def pause(attempt: int, response_headers: Any = None) -> float | None:
    """Seconds to wait before attempt `attempt` + 1, as the hub asks for; None where it asks for too long."""
    asked = (response_headers or {}).get("Retry-After", "")
    if asked.isdigit():
        return float(asked) if float(asked) <= LONGEST_PAUSE else None
    return min(FIRST_PAUSE * 2.0**attempt, 8.0)


def patiently(ask: Callable[[], Any], hub: Hub, what: str) -> Any:
    """The answer to a request, asked again a few times where the hub says that it is busy.

    Raises Unreachable where nothing answers, HubError for any other answer than a good one.
    """
    for attempt in range(TRIES):
        try:
            response = ask()
        except http().TimeoutException:
            if attempt == 1:
                raise Unreachable(f"{hub.endpoint}: no answer in time") from None
            continue
        except (http().HTTPError, OSError) as error:
            raise Unreachable(f"{hub.endpoint}: {plain(error)}") from None
        if response.status_code < 400:
            return response
        wait = pause(attempt, response.headers)
        if response.status_code not in RETRIED or wait is None or attempt == TRIES - 1:
            raise refused(response.status_code, hub, what)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def plain(error: BaseException) -> str:
    """An error of the network in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
