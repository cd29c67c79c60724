"""The kinds of files and folders of rows, and the one function that opens them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind_v.core.errors import DataError, MissingInput, UsageError, nearest_file
from minimind_v.core.hub.sources import ROWS, how_to_get_data
from minimind_v.core.rows.row import OpenedRows, RowStore
from minimind_v.core.rows.splits import LEARN
from minimind_v.core.rows.strangers import no_set

# Opens a path, given the pictures, the requested split, and the order of splits without a request.
Open = Callable[[Path, Path | None, str | None, Sequence[str]], OpenedRows]


@dataclass(frozen=True)
class Store:
    """A kind of files or folders: its name, how to recognise it, and how to open it."""

    name: str
    files: str  # as docs/data.md has it
    recognises: Callable[[Path], bool]
    open: Open
    file_has_splits: bool = False  # a folder may have them anyway


def open_rows(
    data: Path,
    images: Path | None = None,
    split: str | None = None,
    say: Callable[[str], None] = lambda message: None,
    order: Sequence[str] = LEARN,
) -> RowStore:
    """Open rows with the first of STORES that recognises the path.

    `images` holds the pictures that are not in the rows. Of several splits, `split` is read or, where that is None, the
    first of `order`; `say` reports it. Opening reads no row. Raises MissingInput, DataError or UsageError.
    """
    find_rows(data)
    store = find_store(data) or (JSON if data.is_file() else None)
    if store is None:
        raise DataError(f"{data} is not a data file: {no_set(data)}")
    if split is not None and data.is_file() and not store.file_has_splits:
        raise UsageError(f"--split {split}: {data} is one file; only a folder has splits — leave out --split")
    rows = store.open(data, images, split, order)
    for note in filter(None, (rows.choice.notice, rows.left_out)):
        say(note)
    return rows


def find_store(data: Path) -> Store | None:
    """The first of STORES that recognises a path."""
    return next((store for store in STORES if store.recognises(data)), None)


def find_rows(data: Path) -> Path:
    """Return the file or folder of rows. Raises MissingInput, with the most similar name, where it does not exist."""
    if data.is_dir() or data.is_file():
        return data
    raise MissingInput(f"no data file {data}{nearest_file(data, ROWS, folders=True)}{how_to_get_data(data)}")


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _has_metadata(path: Path) -> bool:
    from minimind_v.core.rows.folder import find_metadata

    return path.is_dir() and any(find_metadata(path))


def _is_coco(path: Path) -> bool:
    from minimind_v.core.rows.coco import is_captions

    return path.is_file() and path.suffix == ".json" and is_captions(path)


def _ends_with(*endings: str) -> Callable[[Path], bool]:
    return lambda path: path.is_file() and path.suffix in endings


def _holds(ending: str) -> Callable[[Path], bool]:
    """Whether a path is a file with this ending, or a folder with such files."""
    return lambda path: any(path.rglob(f"*{ending}")) if path.is_dir() else path.suffix == ending


def _with(module: str, name: str, splits: bool = True) -> Open:
    """Open with a class or function of this package, imported late: some imports take a second."""

    def opens(data: Path, images: Path | None, split: str | None, order: Sequence[str]) -> OpenedRows:
        opener = getattr(importlib.import_module(f"minimind_v.core.rows.{module}"), name)
        rows: OpenedRows = opener(data, images, split, order) if splits else opener(data, images)
        return rows

    return opens


JSON = Store("JSON", "`.jsonl` · `.json`", _ends_with(".jsonl", ".json"), _with("jsonl", "open_json", splits=False))
# The first that recognises a path opens it. JSON also opens files of any other name.
STORES = [
    Store("datasets", "a folder saved by `datasets`", _is_saved, _with("arrow", "SavedRows")),
    Store(
        "imagefolder",
        "a folder with `metadata.jsonl`, `.csv` or `.parquet`",
        _has_metadata,
        _with("folder", "FolderRows"),
    ),
    Store("COCO", "`.json` of COCO's captions", _is_coco, _with("coco", "CocoRows"), file_has_splits=True),
    Store("parquet", "`.parquet`", _holds(".parquet"), _with("parquet", "ParquetRows")),
    Store("WebDataset", "`.tar`", _holds(".tar"), _with("tar", "TarRows")),
    Store("CSV", "`.csv` · `.tsv`", _ends_with(".csv", ".tsv"), _with("tables", "CsvRows", splits=False)),
    JSON,
]
