"""One file from a hub into a staged part that goes on at any byte, and the proof that it is the right file.

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
    plain,
    refused,
)

BLOCK = 1 << 20  # bytes hashed at a time
CHUNK = 1 << 16  # bytes written at a time: what a kill can lose
WRONG_TRIES = 3  # times that a file may arrive wrong before its hub is given up

Progress = Callable[[int], None]  # bytes of the file that are here


class WrongFile(MmvError):
    """What arrived is not the file that the hub's listing describes."""


@dataclass(frozen=True)
class Digests:
    """A file's size, its SHA-256, and the name that git would give it as a blob."""

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


def is_it(found: Digests, wanted: RemoteFile) -> bool:
    """Whether a file is the wanted one, by all that the hub tells of it."""
    return (
        wanted.size in (None, found.size)
        and wanted.sha256 in (None, found.sha256)
        and (wanted.git_sha1 in (None, found.git_sha1) or wanted.sha256 is not None)
    )


def check(path: Path, wanted: RemoteFile) -> Digests:
    """The digests of the right file. Raises WrongFile, which says what `path` holds instead."""
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        raise WrongFile("it is an HTML page")
    if head.startswith(b"version https://git-lfs"):
        raise WrongFile("it is a git-lfs pointer, not the data")
    found = digests(path)
    if not is_it(found, wanted):
        if wanted.size not in (None, found.size):
            raise WrongFile(f"{found.size} bytes instead of {wanted.size}")
        raise WrongFile(f"its SHA-256 is {found.sha256[:12]}…, the hub's is {(wanted.sha256 or '?')[:12]}…")
    return found


def bring(
    hub: Hub, url: str, wanted: RemoteFile, part: Path, progress: Progress, warn: Callable[[str], None]
) -> Digests:
    """Fill `part` with the wanted file, going on where it ends. Returns its proven digests.

    A wrong file is named, thrown away and fetched again, three times at most. Raises HubError.
    """
    reason = ""
    for attempt in range(WRONG_TRIES):
        try:
            _receive(hub, url, wanted, part, progress)
            return check(part, wanted)
        except WrongFile as error:
            reason = str(error)
            part.unlink(missing_ok=True)
            if attempt < WRONG_TRIES - 1:
                warn(f"{wanted.path} arrived wrong ({reason}): thrown away, fetching it again")
    raise HubError(
        f"{wanted.path} from {hub.endpoint} arrives wrong ({reason}), {WRONG_TRIES} times — "
        "try another hub or mirror with --hub or --endpoint"
    )


def _receive(hub: Hub, url: str, wanted: RemoteFile, part: Path, progress: Progress) -> None:
    """All bytes of a file. Lost connections are taken up again as long as every few of them bring something new.

    A server that cannot give ranges makes each attempt begin at zero; what counts as new is what was never here.
    """
    most, idle = 0, 0
    while True:
        try:
            if _receive_once(hub, url, wanted, part, progress):
                return
            trouble, wait = "the connection was cut", pause(idle)
        except _Busy as busy:
            trouble, wait = f"HTTP {busy.status}", pause(idle, busy.headers)
            if wait is None:
                raise refused(busy.status, hub, wanted.path) from None
        except (http().HTTPError, ConnectionError, TimeoutError) as error:
            trouble, wait = plain(error), pause(idle)
        here = part.stat().st_size if part.exists() else 0
        idle = 0 if here > most else idle + 1
        most = max(most, here)
        if idle >= TRIES:
            raise Unreachable(
                f"{wanted.path} stopped at {here} of {wanted.size or '?'} bytes from {hub.endpoint} ({trouble}, "
                f"{TRIES} times) — the same command goes on from there"
            )
        time.sleep(wait or 0)


class _Busy(Exception):
    def __init__(self, status: int, headers: Any) -> None:
        self.status, self.headers = status, headers


def _receive_once(hub: Hub, url: str, wanted: RemoteFile, part: Path, progress: Progress) -> bool:
    """One request for what is missing; whether the file is complete. Raises WrongFile, HubError, _Busy."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    have = part.stat().st_size if part.exists() else 0
    if wanted.size is not None and have > wanted.size:
        part.unlink()
        have = 0
    if have == wanted.size:
        part.touch()  # an empty file needs no request
        progress(have)
        return True
    headers = hub.headers() | {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds without a byte
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
        start = _start(answer, have, wanted, hub)
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            for chunk in answer.iter_bytes(CHUNK):
                file.write(chunk)
                file.flush()
                progress(file.tell())
                if wanted.size is not None and file.tell() > wanted.size:
                    raise WrongFile(f"more than its {wanted.size} bytes")
            return wanted.size is None or file.tell() == wanted.size


def _start(answer: Any, have: int, wanted: RemoteFile, hub: Hub) -> int:
    """The byte that an answer's body begins at. Raises for an answer that is not (the rest of) the file."""
    status = answer.status_code
    if status in RETRIED:
        raise _Busy(status, answer.headers)
    if status == 416:
        raise WrongFile("the hub has fewer bytes than are here")
    if status not in (200, 206):
        raise refused(status, hub, wanted.path)
    kind = answer.headers.get("Content-Type", "")
    if kind.startswith("text/html") and not wanted.path.endswith((".html", ".htm")):
        raise WrongFile("it is an HTML page")
    if status == 206:
        told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if not told or int(told[1]) != have or told[2] not in ("*", str(wanted.size or told[2])):
            raise WrongFile(f"an answer for other bytes ({answer.headers.get('Content-Range')})")
        return have
    length = answer.headers.get("Content-Length", "")
    coded = answer.headers.get("Content-Encoding", "identity") != "identity"
    if wanted.size is not None and length.isdigit() and not coded and int(length) != wanted.size:
        raise WrongFile(f"{length} bytes instead of {wanted.size}")
    return 0


def settle(part: Path, final: Path) -> None:
    """Give a proven file its name."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, final)
