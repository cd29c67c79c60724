"""Pictures in parquet files beside the rows, by an id: GQA's form, with the columns `id` and `image`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows.cells import decode_inline, pictures_of

ID, IMAGE = "id", "image"


class ParquetPictures:
    """The pictures of all parquet files of a folder, by their id. The latest row group that was read is kept."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for files without these columns."""
        self.path = path
        self._positions: dict[str, tuple[Path, int, int]] = {}  # file, row group, row in it
        self._group: tuple[tuple[Path, int] | None, list[Any]] = None, []
        for file in sorted(path.glob("*.parquet")):
            try:
                with pq.ParquetFile(file) as opened:
                    lacking = {ID, IMAGE} - set(opened.schema_arrow.names)
                    for group in range(0 if lacking else opened.num_row_groups):
                        ids = opened.read_row_group(group, columns=[ID])[ID].to_pylist()
                        self._positions |= {str(name): (file, group, row) for row, name in enumerate(ids)}
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{file}: not a parquet file that can be read ({' '.join(str(error).split()):.120})"
                ) from None
            if lacking:
                raise DataError(f"{file}: no column `{'`, `'.join(sorted(lacking))}` — pictures need `{ID}`, `{IMAGE}`")

    def read(self, name: str) -> bytes:
        """Read a picture by its id. Raises RowError."""
        if name not in self._positions:
            raise RowError(f"{name}: no picture with this id in {self.path}", "picture missing")
        file, group, row = self._positions[name]
        if self._group[0] != (file, group):
            with pq.ParquetFile(file) as opened:
                self._group = (file, group), opened.read_row_group(group, columns=[IMAGE])[IMAGE].to_pylist()
        cells = pictures_of(self._group[1][row], IMAGE)
        if not cells or cells[0].data is None:
            raise RowError(f"{name}: the file has no bytes of this picture", "picture missing")
        return decode_inline(cells[0].data, name)
