"""A download: which files are missing, which hub has them, whether there is room, then the transfer.

Only a verified file gets its final name. The folder `.mmv-download` in the target folder holds the receipt, the lock
that a second run waits for, and the staged files. Their names carry the digest or commit of their version, so that a
staged file of another version is never resumed.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from minimind_v.core.errors import RunError, UsageError
from minimind_v.core.hub.receipt import STAGING, Kept, Receipt
from minimind_v.core.hub.remote import Hub, HubError, Listing, NotThere, RemoteFile, Unreachable
from minimind_v.core.hub.sources import describe_repo
from minimind_v.core.hub.transfer import Digests, bring, digests, matches, settle
from minimind_v.core.hub.wanted import DownloadPart, Item, Listener

HUBS = ("hf", "modelscope")  # `auto` tries them in this order
MARGIN = 16 << 20  # bytes of free space that a download leaves alone


def open_hub(name: str, endpoint: str | None) -> Hub:
    if name == "hf":
        from minimind_v.core.hub.huggingface import HuggingFace

        return HuggingFace(endpoint)
    from minimind_v.core.hub.modelscope import ModelScope

    return ModelScope(endpoint)


@dataclass
class Download:
    """One `mmv download`."""

    download_parts: Sequence[DownloadPart]
    hubs: Sequence[str]
    listener: Listener
    endpoint: str | None = None
    revision: str | None = None
    transferred: int = field(default=0, init=False)  # bytes that came over the network for files
    _listings: dict[str, Listing] = field(default_factory=dict, init=False)

    def run(self, dry: bool = False) -> list[Item]:
        """Download everything, or with `dry` only list it. Raises HubError, UsageError, RunError."""
        complete = self._complete()
        missing = [want for want in self.download_parts if want.label not in complete]
        items = [item for group in complete.values() for item in group]
        if not missing:
            return items
        hub, listings = self._reach(missing)
        if dry:
            planned = self._plan(hub, missing, listings)
            self._check_replaced(planned)
            return items + planned
        with self._locked({want.folder for want in missing}):
            complete = self._complete()  # another run may have finished in the meantime
            planned = self._plan(hub, [want for want in missing if want.label not in complete], listings)
            items += [item for want in missing for item in complete.get(want.label, [])]
            self._check_replaced(planned)
            self._check_space(planned)
            return items + self._fetch(hub, planned)

    # --- existing files -------------------------------------------------------------------------------------------

    def _complete(self) -> dict[str, list[Item]]:
        """The items that the receipts list as complete, by label. It uses no network and reads no file."""
        complete: dict[str, list[Item]] = {}
        receipts = {folder: Receipt.read(folder) for folder in {want.folder for want in self.download_parts}}
        for want in self.download_parts:
            for name in self.hubs:
                answer = receipts[want.folder].answers(self._key(name, want), want.source.hubs[name].repo)
                if answer is not None:
                    complete[want.label] = [
                        Item(
                            want.folder / file, kept.hub, kept.repo, kept.commit, "",
                            RemoteFile(kept.remote, kept.size, kept.sha256), want, "kept", kept.size, kept.sha256,
                        )
                        for file, kept in answer.items()
                    ]  # fmt: skip
                    break
        return complete

    def _asked(self, hub: str, want: DownloadPart) -> str:
        source = want.source.hubs[hub]
        return f"{hub} {source.repo}@{self.revision or source.revision}"

    def _key(self, hub: str, want: DownloadPart) -> str:
        return f"{self._asked(hub, want)} {want.label}"

    # --- the hub's files ------------------------------------------------------------------------------------------

    def _reach(self, missing: Sequence[DownloadPart]) -> tuple[Hub, dict[str, Listing]]:
        """The first hub that has everything, and its listings. Raises HubError, naming every attempt."""
        failures: list[HubError] = []
        for name in self.hubs:
            hub = open_hub(name, self.endpoint)
            try:
                listings = {want.label: self._listing(hub, want) for want in missing}
                self._refuse_missing(name, missing, listings)
            except HubError as error:
                failures.append(error)
                if name != self.hubs[-1]:
                    self.listener.warn(f"{name}: {error}; trying {self.hubs[len(failures)]}")
                continue
            self.listener.say(f"from {name}, {hub.endpoint}")
            return hub, listings
        if all(isinstance(error, Unreachable) for error in failures):
            raise Unreachable(
                f"no hub can be reached (tried {'; '.join(map(str, failures))}) — name a mirror with --endpoint URL "
                "or HF_ENDPOINT, or copy these files yourself and run this command again to verify them",
                [want.describe() for want in missing],
            )
        raise failures[0] if len(failures) == 1 else HubError("; ".join(map(str, failures)))

    def _refuse_missing(self, hub: str, missing: Sequence[DownloadPart], listings: dict[str, Listing]) -> None:
        """Raises NotThere, naming every file that the hub lacks."""
        troubles: dict[str, None] = {}
        for want in missing:
            try:
                want.choose(listings[want.label], want.source.hubs[hub].repo)
            except NotThere as error:
                troubles[str(error)] = None
        if troubles:
            raise NotThere("; ".join(troubles))

    def _listing(self, hub: Hub, want: DownloadPart) -> Listing:
        source, asked = want.source.hubs[hub.name], self._asked(hub.name, want)
        cached = self._listings
        if asked not in cached:
            remembered = Receipt.read(want.folder).commits.get(asked)
            revision = self.revision or source.revision
            same = [other for other in self.download_parts if other.source.hubs[hub.name].repo == source.repo]
            names = {name for other in same for layout in other.layouts for file in layout for name in file.remote}
            try:
                cached[asked] = hub.listing(source.repo, want.source.kind, remembered or revision, sorted(names))
            except NotThere:
                if remembered in (None, revision):
                    raise
                self.listener.warn(f"{source.repo} no longer has commit {remembered}: using the current {revision}")
                cached[asked] = hub.listing(source.repo, want.source.kind, revision, sorted(names))
        return cached[asked]

    def _plan(self, hub: Hub, missing: Sequence[DownloadPart], listings: dict[str, Listing]) -> list[Item]:
        """Every missing file; one that already exists and is right is kept, whatever its origin."""
        items = []
        for want in missing:
            listing, source = listings[want.label], want.source.hubs[hub.name]
            for name, file in want.choose(listing, source.repo).items():
                remote = hub.complete(source.repo, want.source.kind, listing.commit, file)
                url = hub.url(source.repo, want.source.kind, listing.commit, remote.path)
                item = Item(
                    want.folder / name, hub.name, source.repo, listing.commit, url, remote, want, "would fetch",
                    remote.size if want.rows is None else None, remote.sha256 if want.rows is None else None,
                )  # fmt: skip
                items.append(item if want.rows else self._judge(item))
        return items

    def _judge(self, item: Item) -> Item:
        verified = self._verified(item)
        if verified:
            return replace(item, action="kept", size=verified.size, sha256=verified.sha256)
        return replace(item, staged=item.staged_file.stat().st_size if item.staged_file.exists() else 0)

    def _verified(self, item: Item) -> Digests | None:
        """The digests of an existing file that is right. Its bytes are read unless the receipt lists it."""
        if not item.path.is_file() or (item.remote.sha256 is None and item.remote.git_sha1 is None):
            return None
        kept = Receipt.read(item.folder).files.get(item.path.name)
        if kept and kept.looks_the_same(item.path) and item.remote.sha256 == kept.sha256:
            return Digests(kept.size, kept.sha256, "")
        if item.remote.size not in (None, item.path.stat().st_size):
            return None
        actual = digests(item.path)
        return actual if matches(actual, item.remote) else None

    def _check_replaced(self, items: Sequence[Item]) -> None:
        """Warn of files that the download replaces. Raises UsageError for those that it must not replace: files of
        another repository, and files of the user, such as trained weights.
        """
        replaced = [item for item in items if item.action != "kept" and item.path.exists()]
        if others := [_of_another_repo(item) for item in replaced if not _is_of_the_source(item)]:
            raise UsageError(f"{'; '.join(others)} — move them, or name another --dir")
        if mine := [str(item.path) for item in replaced if _is_mine(item)]:
            raise UsageError(
                f"these files exist and were not downloaded, or were changed after the download: {', '.join(mine)} — "
                f"move them, or name another --dir"
            )
        for item in replaced:
            if item.want.rows is None and (item.remote.sha256 or item.remote.git_sha1):
                what = "SHA-256" if item.remote.size in (None, item.path.stat().st_size) else "size"
                self.listener.warn(f"{item.path} differs from the hub's file ({what}): downloading it again")

    # --- transfer -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, folders: set[Path]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for folder in sorted(folders):  # in one order, so that two runs never wait for each other
                (folder / STAGING).mkdir(parents=True, exist_ok=True)
                lock = FileLock(folder / STAGING / "lock")
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    self.listener.say(f"another download is writing {folder}: waiting for it")
                    lock.acquire()
                stack.callback(lock.release)
            yield

    def _check_space(self, items: Sequence[Item]) -> None:
        """Raises RunError if there is no room for the missing files."""
        needed: dict[int, int] = {}
        folders: dict[int, Path] = {}
        for item in items:
            if item.action != "kept" and item.size is not None:
                device = item.folder.stat().st_dev
                needed[device] = needed.get(device, 0) + max(item.size - item.staged, 0)
                folders[device] = item.folder
        for device, size in needed.items():
            free = shutil.disk_usage(folders[device]).free
            if size and size + MARGIN > free:
                raise RunError(
                    f"{folders[device]}: {size / 1e6:,.1f} MB to download, {free / 1e6:,.1f} MB are free — "
                    "make room, choose another disk with --dir, or download only some rows with --sample N"
                )

    def _fetch(self, hub: Hub, items: Sequence[Item]) -> list[Item]:
        for item in items:
            with _receipt(item.folder) as receipt:
                receipt.commits[self._asked(item.hub, item.want)] = item.commit
        whole = [item for item in items if item.want.rows is None]
        total = sum(item.size or 0 for item in whole if item.action != "kept")
        before, done = 0, []
        for item in whole:
            if item.action == "kept":
                self._record(item)
                done.append(item)
            else:
                done.append(self._bring(hub, item, before, total))
                before += done[-1].size or 0
        for want in dict.fromkeys(item.want for item in items if item.want.rows is not None):
            done += self._sample(hub, [item for item in items if item.want == want])
        for want in dict.fromkeys(item.want for item in items):
            names = [item.path.name for item in items if item.want == want]
            with _receipt(want.folder) as receipt:
                receipt.download_parts[self._key(hub.name, want)] = names
        return done

    def _bring(self, hub: Hub, item: Item, before: int, total: int) -> Item:
        size = item.size or 0

        def progress(received: int) -> None:
            self.listener.bytes_here(item.path.name, received, size, before + received, total)

        for other in (item.folder / STAGING).glob(f"{item.path.name}.*.part"):
            if other != item.staged_file:  # of an earlier version
                other.unlink()
        try:
            fetched = bring(hub, item.url, item.remote, item.staged_file, progress, self.listener.warn)
        except NotThere:
            raise NotThere(
                f"not found: {item.remote.path} of {item.repo} at {item.commit}, which {hub.endpoint} lists but does "
                "not return — run this again later, or name another --endpoint or --hub; complete files are kept"
            ) from None
        if item.path.exists() and not _looks_downloaded(item):  # damaged, or edited by the user
            aside = _free_name(item.path)
            item.path.rename(aside)
            self.listener.warn(f"the file at {item.path} is now {aside}")
        settle(item.staged_file, item.path)
        self.transferred += max(fetched.size - item.staged, 0)
        done = replace(item, action="fetched", size=fetched.size, sha256=fetched.sha256)
        self._record(done)
        return done

    def _sample(self, hub: Hub, items: list[Item]) -> list[Item]:
        from minimind_v.core.hub.sample import take_sample

        self.transferred += take_sample(hub, items, self.listener)
        done = []
        for item in items:
            sample = digests(item.path)
            done.append(replace(item, action="fetched", size=sample.size, sha256=sample.sha256))
            self._record(done[-1])
        return done

    def _record(self, item: Item) -> None:
        status = item.path.stat()
        kept = Kept(
            status.st_size, status.st_mtime_ns, item.sha256 or "", item.hub, item.repo, item.commit, item.remote.path
        )
        with _receipt(item.folder) as receipt:
            receipt.record(item.path.name, kept)


def _looks_downloaded(item: Item) -> bool:
    kept = Receipt.read(item.folder).files.get(item.path.name)
    return kept is not None and kept.looks_the_same(item.path)


def _is_of_the_source(item: Item) -> bool:
    """Whether an existing file is not recorded as that of another repository than the item's and its mirrors."""
    kept = Receipt.read(item.folder).files.get(item.path.name)
    return kept is None or kept.repo in {source.repo for source in item.want.source.hubs.values()}


def _of_another_repo(item: Item) -> str:
    theirs = Receipt.read(item.folder).files[item.path.name].repo
    return (
        f"{item.path} was downloaded from {describe_repo(theirs)}, and {describe_repo(item.repo)} has another file of "
        f"that name"
    )


def _is_mine(item: Item) -> bool:
    """Whether a file is the user's: it never came from a hub, or it is of a kind that users change, and has changed."""
    if item.path.name not in Receipt.read(item.folder).files:
        return True
    often = item.want.source.what == "weights" or item.want.rows is not None
    return often and not _looks_downloaded(item)


def _free_name(path: Path) -> Path:
    """`NAME.old`, or the first of `NAME.old2` … that does not exist."""
    names = (path.with_name(f"{path.name}.old{number if number > 1 else ''}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


@contextlib.contextmanager
def _receipt(folder: Path) -> Iterator[Receipt]:
    """The receipt of a folder; changes are written at the end."""
    receipt = Receipt.read(folder)
    yield receipt
    receipt.write()
