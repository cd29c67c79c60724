"""Hugging Face and its mirrors. The library huggingface_hub makes addresses, tokens, headers and listings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers

from minimind_v.core.hub.remote import HubError, Listing, NotThere, RemoteFile, patiently


class HuggingFace:
    """The hub at `endpoint`, else at HF_ENDPOINT, else at huggingface.co."""

    name = "hf"

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._api = HfApi(endpoint=self.endpoint, library_name="mmv")
        self._timeout = constants.HF_HUB_ETAG_TIMEOUT

    def listing(self, repo: str, kind: str, revision: str, names: Iterable[str]) -> Listing:
        def ask() -> Any:
            return self._api.repo_info(
                repo, repo_type=kind, revision=revision, files_metadata=True, timeout=self._timeout
            )

        try:
            info = self._ask(ask, repo, f"{repo}@{revision}")
        except NotThere:
            listing = self._probe(repo, kind, revision, names)
            if not listing.files:
                raise
            return listing
        if not info.siblings:
            return self._probe(repo, kind, info.sha or revision, names)
        return Listing(info.sha or revision, {entry.rfilename: _remote(entry) for entry in info.siblings})

    def _probe(self, repo: str, kind: str, revision: str, names: Iterable[str]) -> Listing:
        """The files of a plain mirror, which has no listing: each name is requested."""
        commit, files = revision, {}
        for name in names:
            try:
                head = self._head(repo, kind, revision, name)
            except NotThere:
                continue
            commit = head.commit_hash or commit
            files[name] = _described(RemoteFile(name, None), head)
        return Listing(commit, files)

    def complete(self, repo: str, kind: str, commit: str, file: RemoteFile) -> RemoteFile:
        """Add size and digest by a HEAD request: some mirrors list names only."""
        if file.size is not None and (file.sha256 or file.git_sha1):
            return file
        return _described(file, self._head(repo, kind, commit, file.path))

    def _head(self, repo: str, kind: str, revision: str, path: str) -> Any:
        url = self.url(repo, kind, revision, path)

        def ask() -> Any:
            return get_hf_file_metadata(url, timeout=self._timeout, headers=self.headers(), endpoint=self.endpoint)

        return self._ask(ask, repo, f"{path} of {repo}@{revision}")

    def url(self, repo: str, kind: str, commit: str, path: str) -> str:
        return hf_hub_url(repo, path, repo_type=kind, revision=commit, endpoint=self.endpoint)

    def headers(self) -> dict[str, str]:
        return build_hf_headers(library_name="mmv")

    def login(self) -> str:
        return "run `hf auth login` (or set HF_TOKEN)"

    def _ask(self, ask: Any, repo: str, what: str) -> Any:
        def answer() -> SimpleNamespace:
            try:
                return SimpleNamespace(value=ask(), status_code=200, headers={})
            except GatedRepoError as error:
                return SimpleNamespace(status_code=403, headers=error.response.headers)
            except RepositoryNotFoundError as error:
                raise NotThere(  # the hub answers 401 for a missing and for a hidden repository
                    f"no repository {repo} at {self.endpoint}, or it is private — if you have access, {self.login()}"
                ) from error
            except HfHubHTTPError as error:
                return SimpleNamespace(status_code=error.response.status_code, headers=error.response.headers)
            except (ValueError, TypeError, KeyError) as error:
                raise HubError(
                    f"{self.endpoint} did not answer like a hub for {what} (an HTML page?) — check --endpoint"
                ) from error

        return patiently(answer, self, what).value


def _remote(entry: Any) -> RemoteFile:
    lfs = entry.lfs
    if lfs is None:
        return RemoteFile(entry.rfilename, entry.size, git_sha1=entry.blob_id)
    return RemoteFile(entry.rfilename, lfs.size if lfs.size is not None else entry.size, sha256=lfs.sha256)


def _described(file: RemoteFile, head: Any) -> RemoteFile:
    """The file with the facts of a HEAD answer."""
    tag = head.etag or ""
    return replace(
        file,
        size=file.size if file.size is not None else head.size,
        sha256=file.sha256 or (tag if re.fullmatch("[0-9a-f]{64}", tag) else None),
        git_sha1=file.git_sha1 or (tag if re.fullmatch("[0-9a-f]{40}", tag) else None),
    )
