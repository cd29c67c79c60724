"""The transfer of one file: it resumes at any byte, and the result is verified.

The library's own `hf_hub_download` (huggingface_hub 2.4, `_download_to_tmp_and_move`) writes to a name that is unique
to its process and deletes it at the end, so a run that is killed starts over; and it checks the size only. Therefore
its session, headers and addresses are used here (proxies, redirects, tokens), and the bytes are received by this file.
For the same reason nothing is taken by Xet: its client rebuilds whole files from chunks in a cache of its own and
begins again after a kill, while the plain address of the same file serves ranges, whose sum SHA-256 proves.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_v.core.errors import MmvError
from minimind_v.core.hub.remote import (
    RETRIED,
    TRIES,
    Hub,
    HubError,
    RemoteFile,
    Unreachable,
    http,
    pause,
    reason_of,
    refused,
)

BLOCK = 1 << 20  # bytes hashed at a time
CHUNK = 1 << 16  # bytes written at a time: what a kill can lose
WRONG_TRIES = 3  # times that a file may arrive wrong before its hub is given up

Progress = Callable[[int], None]  # bytes of the file received so far


class WrongFile(MmvError):
    """The received file is not the one that the hub's listing describes."""


@dataclass(frozen=True)
class Digests:
    """A file's size, its SHA-256, and its git blob hash."""

    size: int
    sha256: str
    git_sha1: str


def digests(path: Path) -> Digests:
    size = path.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            blob.update(block)
    return Digests(size, sha256.hexdigest(), blob.hexdigest())


def matches(digests: Digests, remote: RemoteFile) -> bool:
    """Whether digests are those of a remote file, as far as the hub describes it."""
    return (
        remote.size in (None, digests.size)
        and remote.sha256 in (None, digests.sha256)
        and (remote.git_sha1 in (None, digests.git_sha1) or remote.sha256 is not None)
    )


def check(path: Path, remote: RemoteFile) -> Digests:
    """The digests of the right file. Raises WrongFile, which names the difference."""
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        raise WrongFile("it is an HTML page")
    if head.startswith(b"version https://git-lfs"):
        raise WrongFile("it is a git-lfs pointer, not the data")
    actual = digests(path)
    if not matches(actual, remote):
        if remote.size not in (None, actual.size):
            raise WrongFile(f"{actual.size} bytes instead of {remote.size}")
        raise WrongFile(f"its SHA-256 is {actual.sha256[:12]}…, the hub's is {(remote.sha256 or '?')[:12]}…")
    return actual


def bring(
    hub: Hub, url: str, remote: RemoteFile, staged: Path, progress: Progress, warn: Callable[[str], None]
) -> Digests:
    """Complete `staged` to the remote file and return its verified digests.

    A wrong file is removed and downloaded again, three times at most. Raises HubError.
    """
    reason = ""
    for attempt in range(WRONG_TRIES):
        try:
            _receive(hub, url, remote, staged, progress)
            return check(staged, remote)
        except WrongFile as error:
            reason = str(error)
            staged.unlink(missing_ok=True)
            if attempt < WRONG_TRIES - 1:
                warn(f"{remote.path} was corrupt after the download ({reason}): removed, downloading it again")
    raise HubError(
        f"{remote.path} from {hub.endpoint} arrived damaged {WRONG_TRIES} times ({reason}) — "
        "try another hub or mirror with --hub or --endpoint"
    )


def _receive(hub: Hub, url: str, remote: RemoteFile, staged: Path, progress: Progress) -> None:
    """Receive all bytes of a file. After a lost connection it resumes, as long as new bytes arrive.

    Without ranges each attempt begins at zero; new bytes are those beyond the longest attempt.
    """
    most, idle = 0, 0
    while True:
        try:
            if _receive_once(hub, url, remote, staged, progress):
                return
            trouble, wait = "the connection was cut", pause(idle)
        except _Busy as busy:
            trouble, wait = f"HTTP {busy.status}", pause(idle, busy.headers)
            if wait is None:
                raise refused(busy.status, hub, remote.path) from None
        except (http().HTTPError, ConnectionError, TimeoutError) as error:
            trouble, wait = reason_of(error), pause(idle)
        received = staged.stat().st_size if staged.exists() else 0
        idle = 0 if received > most else idle + 1
        most = max(most, received)
        if idle >= TRIES:
            raise Unreachable(
                f"{remote.path} stopped at {received} of {remote.size or '?'} bytes from {hub.endpoint} ({trouble}, "
                f"{TRIES} times) — run the same command again to resume"
            )
        time.sleep(wait or 0)


class _Busy(Exception):
    def __init__(self, status: int, headers: Any) -> None:
        self.status, self.headers = status, headers


def _receive_once(hub: Hub, url: str, remote: RemoteFile, staged: Path, progress: Progress) -> bool:
    """Request the missing bytes; return whether the file is complete. Raises WrongFile, HubError, _Busy."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    have = staged.stat().st_size if staged.exists() else 0
    if remote.size is not None and have > remote.size:
        staged.unlink()
        have = 0
    if have == remote.size:
        staged.touch()  # an empty file needs no request
        progress(have)
        return True
    headers = hub.headers() | {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds without a byte
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
        start = _start(answer, have, remote, hub)
        with staged.open("r+b" if start else "wb") as file:
            file.seek(start)
            for chunk in answer.iter_bytes(CHUNK):
                file.write(chunk)
                file.flush()
                progress(file.tell())
                if remote.size is not None and file.tell() > remote.size:
                    raise WrongFile(f"more than its {remote.size} bytes")
            return remote.size is None or file.tell() == remote.size


def _start(answer: Any, have: int, remote: RemoteFile, hub: Hub) -> int:
    """The offset of an answer's body in the file. Raises for an answer that is not (the rest of) the file."""
    status = answer.status_code
    if status in RETRIED:
        raise _Busy(status, answer.headers)
    if status == 416:
        raise WrongFile("the hub has fewer bytes than were received")
    if status not in (200, 206):
        raise refused(status, hub, remote.path)
    kind = answer.headers.get("Content-Type", "")
    if kind.startswith("text/html") and not remote.path.endswith((".html", ".htm")):
        raise WrongFile("it is an HTML page")
    if status == 206:
        given = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if not given or int(given[1]) != have or given[2] not in ("*", str(remote.size or given[2])):
            raise WrongFile(f"the answer has other bytes than requested ({answer.headers.get('Content-Range')})")
        return have
    length = answer.headers.get("Content-Length", "")
    coded = answer.headers.get("Content-Encoding", "identity") != "identity"
    if remote.size is not None and length.isdigit() and not coded and int(length) != remote.size:
        raise WrongFile(f"{length} bytes instead of {remote.size}")
    return 0


def settle(staged: Path, final: Path) -> None:
    """Give a verified file its name."""
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(staged, final)
