"""Rows of a folder that `datasets` saved (`save_to_disk`); needs the optional extra of that name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind_v.core.errors import DataError, MissingInput, RowError, UsageError
from minimind_v.core.rows.field_names import picture_field
from minimind_v.core.rows.file_rows import FileRows
from minimind_v.core.rows.parquet import columns_of_bytes
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
        binary = columns_of_bytes(path, dataset.features.arrow_schema)
        if not len(dataset):
            raise DataError(f"{path}: the data set has no rows")
        self._bytes = picture_field(binary) or ""
        self._others = [name for name in binary if name != self._bytes]
        self.left_out = (
            f"{path}: the bytes in {', '.join(self._others)} are ignored and not copied" if self._others else ""
        )
        self._rows = dataset.with_format("arrow")  # it decodes no picture: `data` does, within its limits
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
        row = self.read(fields)
        row.extra.pop(self._bytes, None)  # of a row with its pictures elsewhere, or none
        return row if row.images else refuse_unread(row, others)


def _together(path: Path, splits: list[Any]) -> Any:
    import datasets

    try:
        return datasets.concatenate_datasets(splits)
    except Exception as error:  # the library raises many kinds
        raise DataError(f"{path}: its splits do not match ({' '.join(str(error).split())})") from None
