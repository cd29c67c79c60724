"""What a download comes to: the files of each part, for a size of model, a split, or a sample of the first rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from minimind_v.core.hub.remote import Listing, NotThere, RemoteFile
from minimind_v.core.hub.sources import (
    CLIP_FILES,
    SOURCES,
    SPLITS,
    TOKENIZER_FILES,
    Layout,
    Source,
    dataset_files,
    weights_files,
)
from minimind_v.core.paths import SAMPLE_DIR


@dataclass(frozen=True)
class DownloadPart:
    """Files that are wanted together, from one repository into one folder."""

    label: str
    source: Source
    layouts: tuple[Layout, ...]
    folder: Path
    rows: int | None = None  # only the first rows

    def choose(self, listing: Listing, repo: str) -> dict[str, RemoteFile]:
        """Name here → file there, by the first layout that the repository has. Raises NotThere, naming what it has."""
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
        closest = min(map(len, lacks))
        nothing = all(len(names) == len(layout) for names, layout in zip(lacks, self.layouts, strict=True))
        # Of a layout that is there in part, what is missing in it; where nothing is there, what each would have.
        lacking = " / ".join(", ".join(names) for names in lacks if nothing or len(names) == closest)
        there = [name for name in sorted(listing.files) if not name.startswith(".")]
        told = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
        raise NotThere(
            f"{repo} at {listing.commit} lacks {lacking} — it has: {told or 'nothing'}; check --revision, or name "
            "another --endpoint"
        )


def download_parts(
    what: str,
    root: Path,
    preset: str,
    file_of: Callable[[str], str],
    splits: Iterable[str] = SPLITS,
    rows: int | None = None,
) -> list[DownloadPart]:
    """Everything that `what` comes to below `root`; `file_of` names the weights of a stage in the preset.

    `all` is what training needs. Trained weights come only when they are asked for: they have the names that a run
    gives to its own, which it would then refuse to replace.
    """
    found = []
    parts = [name for name in SOURCES if name != "weights"] if what == "all" else [what]
    for source in (SOURCES[part] for part in parts):
        folder = root / source.folder
        match source.what:
            case "clip":
                found.append(DownloadPart("clip", source, CLIP_FILES, folder))
            case "tokenizer":
                found.append(DownloadPart("tokenizer", source, TOKENIZER_FILES, folder))
            case "lm":
                found.append(DownloadPart(f"lm {preset}", source, weights_files(file_of("lm")), folder))
            case "weights":
                names = [file_of(stage) for stage in ("pretrain", "sft")]
                found.append(DownloadPart(f"weights {preset}", source, weights_files(*names), folder))
            case "dataset":
                place = folder if rows is None else root / SAMPLE_DIR
                some = "" if rows is None else f", first {rows} rows"
                found += [DownloadPart(f"{split}{some}", source, dataset_files(split), place, rows) for split in splits]
    return found
