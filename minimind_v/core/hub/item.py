"""The items of a download, and the interface of its progress view."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from minimind_v.core.hub.receipt import STAGING
from minimind_v.core.hub.remote import RemoteFile
from minimind_v.core.hub.wanted import DownloadPart


class Listener(Protocol):
    """The view of a download."""

    def say(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...
    def bytes_here(self, file: str, received: int, size: int, all_received: int, all_size: int) -> None: ...


@dataclass(frozen=True)
class Item:
    """A file of a download, and the action for it."""

    path: Path
    hub: str
    repo: str
    commit: str
    url: str
    remote: RemoteFile
    action: str = "kept"  # kept, fetched, would fetch
    size: int | None = None
    sha256: str | None = None
    want: DownloadPart | None = None
    staged: int = 0  # bytes that were received before

    @property
    def folder(self) -> Path:
        assert self.want
        return self.want.folder

    @property
    def staged_file(self) -> Path:
        version = self.remote.sha256 or self.remote.git_sha1 or self.commit
        return self.folder / STAGING / f"{self.path.name}.{version.replace('/', '_')[:16]}.part"
