"""Pictures in parquet files beside the rows, by an id: GQA's form, with the columns `id` and `image`."""

from __future__ import annotations

from pathlib import Path

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows.cells import decode_inline, pictures_of
from minimind_v.core.rows.parquet_pieces import KEPT_PICTURES, KEPT_TEXT, Pieces, checked_footer

ID, IMAGE = "id", "image"


class ParquetPictures:
    """The pictures of all parquet files of a folder, by their id."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for files without these columns."""
        self.path, footers = path, []
        files = sorted(path.glob("*.parquet"))
        for file in files:
            try:
                footers.append(checked_footer(file))
            except Exception as error:  # the library raises many kinds on damaged files
                raise DataError(
                    f"{file}: not a parquet file that can be read ({' '.join(str(error).split()):.120})"
                ) from None
            if lacking := {ID, IMAGE} - set(footers[-1].schema.to_arrow_schema().names):
                raise DataError(f"{file}: no column `{'`, `'.join(sorted(lacking))}` — images need `{ID}`, `{IMAGE}`")
        ids = Pieces(files, footers, [ID], KEPT_TEXT)
        try:
            self._rows = {str(ids.row(number)[ID]): number for number in range(ids.rows)}
        except RowError as error:
            raise DataError(f"{path}: {error}") from None
        self._images = Pieces(files, footers, [IMAGE], KEPT_PICTURES)

    def read(self, name: str) -> bytes:
        """Read a picture by its id. Raises RowError."""
        if name not in self._rows:
            raise RowError(f"{name}: no image with this id in {self.path}", "image missing")
        cells = pictures_of(self._images.row(self._rows[name])[IMAGE], IMAGE)
        if not cells or cells[0].data is None:
            raise RowError(f"{name}: the file has no bytes of this image", "image missing")
        return decode_inline(cells[0].data, name)
