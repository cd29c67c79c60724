"""Rows of a folder that `datasets` saved (`save_to_disk`); needs the optional extra of that name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind_v.core.errors import DataError, MissingInput, RowError, UsageError
from minimind_v.core.rows.cells import decode_inline
from minimind_v.core.rows.field_names import READ, TALKS, is_readable, picture_field
from minimind_v.core.rows.file_rows import FileRows
from minimind_v.core.rows.forms import read_row
from minimind_v.core.rows.row import Row
from minimind_v.core.rows.splits import ALL, LEARN, choose
from minimind_v.core.rows.unread import refuse_unread


class SavedRows(FileRows):
    """A saved dataset, or one split of a saved set of them. Its files are mapped, not read."""

    file_kind = "saved by datasets"

    def __init__(
        self, path: Path, images: Path | None = None, split: str | None = None, order: Sequence[str] = LEARN
    ) -> None:
        """`split` and `order` select the split.

        Raises MissingInput without the library, DataError where the folder is something else or its splits differ,
        UsageError for an unknown split.
        """
        try:
            import datasets
        except ImportError:
            raise MissingInput(f"{path}: reading it needs an extra — pip install 'minimind-v[datasets]'") from None
        try:
            dataset = datasets.load_from_disk(str(path))
        except Exception as error:  # the library raises many kinds
            raise DataError(f"{path}: not a saved dataset ({' '.join(str(error).split())})") from None
        self._folder = path
        if isinstance(dataset, datasets.DatasetDict):
            self.choice = choose(path, {name: len(rows) for name, rows in dataset.items()}, split, order, "row")
            together = self.choice.name == ALL
            dataset = _together(path, list(dataset.values())) if together else dataset[self.choice.name]
            self._folder = path if together else path / self.choice.name
        elif split is not None:
            raise UsageError(f"--split {split}: {path} has only one split — leave out --split")
        if not is_readable(dataset.column_names):
            raise DataError(
                f"{path}: no column `conversations`, only {', '.join(dataset.column_names)} — a row needs {READ}"
            )
        if not len(dataset):
            raise DataError(f"{path}: the data set has no rows")
        # Keep the bytes of pictures: `data` decodes them, within its limits. Videos are not read.
        for name, kind in dataset.features.items():
            if (plain := _undecoded(kind)) != kind:
                dataset = dataset.cast_column(name, plain)
        binary = [name for name, kind in dataset.features.items() if name not in TALKS and _holds_bytes(kind)]
        self._bytes = picture_field(binary) or ""
        self._others = [name for name in binary if name != self._bytes]
        self.left_out = (
            f"{path}: the bytes in {', '.join(self._others)} are ignored and not copied" if self._others else ""
        )
        self._rows = dataset.with_format("arrow")
        super().__init__(path, images)

    def __len__(self) -> int:
        return len(self._rows)

    def location(self, index: int) -> str:
        return f"{self._folder}:{index + 1}"

    def row(self, index: int) -> Row:
        try:
            table = self._rows[index]
            table.validate(full=True)  # wrong lengths in a damaged file lead anywhere in memory
            cells = {name: table.column(name)[0].as_py() for name in table.column_names}
            fields = {name: value for name, value in cells.items() if value is not None}
        except Exception as error:  # the library raises many kinds
            raise RowError(f"cannot be read ({' '.join(str(error).split())})", "json") from None
        others = {name: fields.pop(name) for name in self._others if name in fields}
        row = read_row(fields)
        row.extra.pop(self._bytes, None)  # of a row with its pictures elsewhere, or none
        return row if row.images else refuse_unread(row, others)

    def picture(self, index: int, position: int, name: str) -> bytes:
        data = self.row(index).inline.get(position)
        return self._images.read(name) if data is None else decode_inline(data, name)


def _together(path: Path, splits: list[Any]) -> Any:
    import datasets

    try:
        return datasets.concatenate_datasets(splits)
    except Exception as error:  # the library raises many kinds
        raise DataError(f"{path}: its splits do not match ({' '.join(str(error).split())})") from None


def _undecoded(feature: Any) -> Any:
    """The same feature with `decode=False` for all pictures, videos and audio in it."""
    import datasets

    if isinstance(feature, datasets.Image | datasets.Video | datasets.Audio):
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.LargeList):
        return datasets.LargeList(_undecoded(feature.feature))
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature), length=feature.length)
    return feature


def _holds_bytes(feature: Any) -> bool:
    import datasets

    if isinstance(feature, dict):
        return "bytes" in feature and _holds_bytes(feature["bytes"])
    if isinstance(feature, datasets.Image):
        return True
    inner = getattr(feature, "feature", None)
    return _holds_bytes(inner) if inner is not None else getattr(feature, "dtype", "") in _BINARY


_BINARY = ("binary", "large_binary", "binary_view")
