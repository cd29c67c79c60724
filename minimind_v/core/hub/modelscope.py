"""ModelScope by its documented HTTP interface: one request lists files, one returns a file.

It gives no commit for a branch, but a SHA-256 for every file. A staged file belongs to that sum, so a branch that
moves between two runs never mixes two versions of a file. Source: modelscope/hub/api.py of ModelScope's client.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlencode

from minimind_v.core.hub.remote import HubError, Listing, RemoteFile, patiently

PAGE = 200  # files in one answer about a dataset


class ModelScope:
    """The hub at `endpoint`, else at MODELSCOPE_DOMAIN, else at www.modelscope.cn."""

    name = "modelscope"

    def __init__(self, endpoint: str | None = None) -> None:
        from huggingface_hub import constants

        domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        self.endpoint = (endpoint or (domain if "://" in domain else f"https://{domain}")).rstrip("/")
        self._timeout = constants.HF_HUB_ETAG_TIMEOUT

    def listing(self, repo: str, kind: str, revision: str, names: Iterable[str]) -> Listing:
        files: dict[str, RemoteFile] = {}
        for page in range(1, 101):
            entries = self._page(repo, kind, revision, page)
            files |= {file.path: file for file in map(_remote, entries) if file}
            if kind == "model" or len(entries) < PAGE:
                break
        return Listing(revision, files)

    def complete(self, repo: str, kind: str, commit: str, file: RemoteFile) -> RemoteFile:
        return file

    def url(self, repo: str, kind: str, commit: str, path: str) -> str:
        return f"{self._api(repo, kind)}?{urlencode({'Revision': commit, 'FilePath': path})}"

    def headers(self) -> dict[str, str]:
        token = os.environ.get("MODELSCOPE_API_TOKEN")
        return {"User-Agent": "mmv"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def login(self) -> str:
        return "set MODELSCOPE_API_TOKEN"

    def _api(self, repo: str, kind: str) -> str:
        return f"{self.endpoint}/api/v1/{kind}s/{repo}/repo"

    def _page(self, repo: str, kind: str, revision: str, page: int) -> list[dict[str, Any]]:
        from huggingface_hub.utils import get_session

        asked = {"Revision": revision, "Recursive": "true"}
        if kind == "dataset":
            asked |= {"PageNumber": str(page), "PageSize": str(PAGE)}
        url = f"{self._api(repo, kind)}/{'tree' if kind == 'dataset' else 'files'}?{urlencode(asked)}"
        what = f"{repo}@{revision}"
        answer = patiently(lambda: get_session().get(url, headers=self.headers(), timeout=self._timeout), self, what)
        try:
            body = answer.json()
            if body.get("Success") is False:
                raise HubError(f"{self.endpoint}: no listing of {what} ({body.get('Message') or 'no reason given'})")
            return list(body["Data"]["Files"] or [])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise HubError(f"{self.endpoint} did not answer like ModelScope for {what} — check --endpoint") from None


def _remote(entry: dict[str, Any]) -> RemoteFile | None:
    if entry.get("Type") == "tree":
        return None
    size = entry.get("Size")
    return RemoteFile(entry["Path"], int(size) if size is not None else None, entry.get("Sha256") or None)
