"""Opens the pictures of rows: a folder, a zip or a tar."""

from __future__ import annotations

from pathlib import Path

from minimind_v.core.rows.pictures import FolderPictures, NoPictures, Pictures, ZipPictures, find_pictures
from minimind_v.core.rows.tar_pictures import TarPictures


def open_pictures(path: Path | None) -> Pictures:
    """Open a folder, zip or tar of pictures; None for none. Raises MissingInput or DataError."""
    if path is None:
        return NoPictures()
    find_pictures(path)
    if path.suffix == ".tar" and path.is_file():
        return TarPictures(path)
    return FolderPictures(path) if path.is_dir() else ZipPictures(path)
