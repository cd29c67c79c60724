"""Upload an exported folder to a hub: all files of the export in one commit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_v.core.errors import RunError, UsageError, WeightsError
from minimind_v.core.export.folder import read_manifest
from minimind_v.core.formats.inventory import MANIFEST
from minimind_v.core.hub.remote import http

CARD = "README.md"  # a user may edit it


@dataclass(frozen=True)
class Published:
    """The upload: its repository, address, commit and size."""

    repo: str
    url: str
    commit: str
    files: int
    bytes: int


def publish(folder: Path, repo: str, private: bool = False, endpoint: str | None = None) -> Published:
    """Upload `folder` as the model repository `repo` (owner/name), which is made if it is missing.

    Raises UsageError where the folder or the name is invalid, WeightsError where a file was changed or is missing,
    RunError where the hub refuses or cannot be reached. All files appear on the hub at once.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import disable_progress_bars, validate_repo_id

    files = _files_of(folder)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--repo {repo}: {str(error).splitlines()[0]}") from None
    if repo.count("/") != 1:
        raise UsageError(f"--repo {repo} must have the form owner/name")
    hub = (endpoint or constants.ENDPOINT).rstrip("/")
    if not get_token():
        raise RunError(f"no token for {hub} — run `hf auth login` (or set HF_TOKEN) with a write token")
    disable_progress_bars()
    if "huggingface.co" not in hub:  # others take large files as git does
        constants.HF_HUB_DISABLE_XET = True
    commit = _send(HfApi(endpoint=hub, library_name="mmv"), folder, files, repo, private)
    size = sum((folder / name).stat().st_size for name in files)
    return Published(repo, f"{hub}/{repo}", commit, len(files), size)


def _files_of(folder: Path) -> list[str]:
    """The files that the conversion wrote, checked; other files are not uploaded."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(f"{folder}: not written by `mmv convert` — convert the model first (--to hf)")
    for name, size in manifest["files"].items():
        path = folder / Path(name).name
        if not path.is_file():
            raise WeightsError(f"{path} is missing — convert the model again")
        if name != CARD and path.stat().st_size != size:
            raise WeightsError(f"{path} was changed after the export ({size:,} bytes) — convert the model again")
    return sorted((*manifest["files"], MANIFEST))


def _send(api: Any, folder: Path, files: list[str], repo: str, private: bool) -> str:
    """Make the repository if it is missing, commit the files, and return the commit."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    additions = [CommitOperationAdd(name, folder / name) for name in files]
    try:
        if not _create(api, repo, private) and private and api.model_info(repo).private is False:
            raise RunError(f"{repo} exists and is public — make it private on the hub, or name another --repo")
        return api.create_commit(repo, additions, commit_message="Upload by mmv").oid
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = (error.server_message or str(error)).strip().splitlines()[0]
        hint = " — check that the repository is yours and the token may write" if status in (401, 403, 404) else ""
        raise RunError(f"{api.endpoint} refuses {repo} ({status}: {reason:.200}){hint}") from None
    except (http().HTTPError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"{api.endpoint} cannot be reached ({reason:.200}) — try again later") from None


def _create(api: Any, repo: str, private: bool) -> bool:
    """Make the repository; false where it exists."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repo, private=private or None)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        return False
    return True
