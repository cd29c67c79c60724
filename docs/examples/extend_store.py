"""A row store: rows in SQLite. `mmv` trains on `rows.sqlite`, checks it and converts it as any other file of rows.

The file has one table: `CREATE TABLE rows (question TEXT, answer TEXT, image BLOB)`; an image may be NULL.
"""

import sqlite3
from pathlib import Path

from minimind_v.core.errors import DataError
from minimind_v.core.rows.file_rows import FileRows
from minimind_v.core.rows.forms import read_row
from minimind_v.core.rows.row import Row
from minimind_v.core.rows.stores import STORES, Store


class SqliteRows(FileRows):
    """Rows of a table, by their number. Each process opens the file for itself: `handle` is its connection."""

    file_kind = "SQLite"

    def __init__(self, path: Path, images: Path | None = None) -> None:
        super().__init__(path, images)
        try:
            self._count = self.handle.execute("SELECT count(*) FROM rows").fetchone()[0]
        except sqlite3.Error as error:
            raise DataError(f"{path}: not a database with a table `rows` ({error})") from None

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)

    def __len__(self) -> int:
        return self._count

    def row(self, index: int) -> Row:
        """The row from its fields; one of the forms that are read is a question, its answer and an image."""
        query = "SELECT question, answer, image FROM rows WHERE rowid = ?"
        question, answer, image = self.handle.execute(query, (index + 1,)).fetchone()
        return read_row({"question": question, "answer": answer, "image": image})


STORES.insert(
    0,  # asked before the stores that are there already
    Store(
        "SQLite",
        "`.sqlite`",
        recognises=lambda path: path.suffix == ".sqlite",
        open=lambda path, images, split, order: SqliteRows(path, images),
    ),
)
