"""The files of a download, by model size, split or sample, and the interface of its progress view."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Protocol

from minimind_v.core.hub.receipt import STAGING
from minimind_v.core.hub.remote import Listing, NotThere, RemoteFile
from minimind_v.core.hub.sources import SPLITS, Benchmark, Layout, Source, dataset_files, sources_of, weights_files
from minimind_v.core.paths import SAMPLE_DIR


@dataclass(frozen=True)
class DownloadPart:
    """Files that belong together, from one repository into one folder."""

    label: str
    source: Source
    layouts: tuple[Layout, ...]
    folder: Path
    rows: int | None = None  # only the first rows
    pattern: str = ""  # of remote names, instead of layouts

    def describe(self) -> str:
        """Its files, where they are and where they belong, in words."""
        names = self.pattern or ", ".join(file.name for file in next(iter(self.layouts), ())) or "the files"
        return f"{names} of {next(iter(self.source.hubs.values())).repo} into {self.folder}"

    def choose(self, listing: Listing, repo: str) -> dict[str, RemoteFile]:
        """Local name → remote file, by the first layout that the repository has. Raises NotThere, naming its files."""
        matching = [file for name, file in sorted(listing.files.items()) if fnmatchcase(name, self.pattern)]
        if matching:
            return {PurePosixPath(file.path).name: file for file in matching}
        for layout in self.layouts:
            chosen = {
                file.name: listing.files[next(name for name in file.remote if name in listing.files)]
                for file in layout
                if any(name in listing.files for name in file.remote)
            }
            if len(chosen) == len(layout):
                return chosen
        lacks = [
            [file.name for file in layout if not any(name in listing.files for name in file.remote)]
            for layout in self.layouts
        ]
        closest = min(map(len, lacks), default=0)
        nothing = all(len(names) == len(layout) for names, layout in zip(lacks, self.layouts, strict=True))
        # The missing files of the most complete layout; if every layout lacks all files, those of each.
        lacking = " / ".join(", ".join(names) for names in lacks if nothing or len(names) == closest) or self.pattern
        present = [name for name in sorted(listing.files) if not name.startswith(".")]
        shown = ", ".join(present[:20]) + (f" and {len(present) - 20} more" if len(present) > 20 else "")
        raise NotThere(
            f"{repo} at {listing.commit} lacks {lacking} — it has: {shown or 'nothing'}; check --revision, or use "
            "another --endpoint"
        )


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
    want: DownloadPart
    action: str  # kept, fetched, would fetch
    size: int | None
    sha256: str | None
    staged: int = 0  # bytes that were received before

    @property
    def folder(self) -> Path:
        return self.want.folder

    @property
    def staged_file(self) -> Path:
        version = self.remote.sha256 or self.remote.git_sha1 or self.commit
        return self.folder / STAGING / f"{self.path.name}.{version.replace('/', '_')[:16]}.part"


def download_parts(
    what: str,
    root: Path,
    preset: str,
    file_of: Callable[[str], str],
    splits: Iterable[str] = SPLITS,
    rows: int | None = None,
) -> list[DownloadPart]:
    """The files of `what`, below `root`; `file_of` names the weights of a stage in the preset.

    `all` is everything that training needs. It leaves out trained weights: they have the names of a run's own weights,
    which the run would refuse to replace.
    """
    groups: list[DownloadPart] = []
    sources = sources_of(preset)
    names = [name for name in sources if name != "weights"] if what == "all" else [what]
    for source in (sources[name] for name in names):
        folder = root / source.folder
        match source.what:
            case "clip" | "tokenizer":
                groups.append(DownloadPart(source.what, source, source.layouts, folder))
            case "lm":
                groups.append(DownloadPart(f"lm {preset}", source, weights_files(file_of("lm")), folder))
            case "weights":
                files = [file_of(stage) for stage in ("pretrain", "sft")]
                groups.append(DownloadPart(f"weights {preset}", source, weights_files(*files), folder))
            case "dataset":
                target = folder if rows is None else root / SAMPLE_DIR
                some = "" if rows is None else f", first {rows} rows"
                groups += [
                    DownloadPart(f"{split}{some}", source, dataset_files(split), target, rows) for split in splits
                ]
    return groups


def benchmark_parts(benchmark: Benchmark, root: Path) -> list[DownloadPart]:
    """The rows of a benchmark and, where these have none, its images, below `root`."""
    source = benchmark.source
    rows = DownloadPart(source.what, source, (), root / source.folder, pattern=benchmark.pattern)
    if not benchmark.images:
        return [rows]
    label = f"{source.what} images"
    return [rows, DownloadPart(label, source, (), root / benchmark.images_folder, pattern=benchmark.images)]
