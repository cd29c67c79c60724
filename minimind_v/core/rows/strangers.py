"""Recognise files that are not data files, and suggest what to do."""

from __future__ import annotations

import zipfile
from pathlib import Path

from minimind_v.core.hub.sources import PICTURE_ENDINGS, ROWS, how_to_get
from minimind_v.core.rows.row import PICTURE_BEGINNINGS

WORKBOOK = "this is an Excel workbook — save it as CSV UTF-8"
STRANGERS = {  # first bytes of files that are neither rows nor a zip
    b"\x1f\x8b": "this is a gzip archive — unpack it first",
    b"7z\xbc\xaf": "this is a 7z archive — unpack it first",
    b"Rar!": "this is a RAR archive — unpack it first",
    b"BZh": "this is a bzip2 archive — unpack it first",
    b"\xfd7zXZ": "this is an xz archive — unpack it first",
    b"\x28\xb5\x2f\xfd": "this is a zstd archive — unpack it first",
    b"\xd0\xcf\x11\xe0": WORKBOOK,
    b"\xff\xfe": "this is text in UTF-16 — save it as UTF-8",
    b"\xfe\xff": "this is text in UTF-16 — save it as UTF-8",
}
TAR = slice(257, 262)  # the bytes of a tar archive's signature
WEIGHTS = "these are model weights, not a data file"
# First bytes of files that other options take.
NO_ROWS = {b"GGUF": WEIGHTS} | dict.fromkeys(PICTURE_BEGINNINGS, "this is an image file, not a data file")


def stand_in(path: Path) -> str | None:
    """What was saved instead of a data file, judged by its beginning; None for nothing wrong."""
    with path.open("rb") as file:
        raw = file.read(512)
    for beginning, meaning in STRANGERS.items():
        if raw.startswith(beginning):
            if beginning == b"\x1f\x8b" and path.name.endswith((".tar", ".tar.gz", ".tgz")):
                return "this is a compressed tar archive — decompress it first; a .tar is read in place"
            return meaning
    if raw[TAR] == b"ustar" and path.suffix != ".tar":
        return "this is a tar archive — give it a name that ends in .tar"
    if raw.startswith(b"PAR1") and path.suffix != ".parquet":
        return "this is parquet — give it a name that ends in .parquet"
    head = raw.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"<"):
        return "this is an HTML page, not data — the web page of a file was saved instead of the file"
    if head.startswith(b"version https://git-lfs"):
        return f"this is a git-lfs pointer, not the data — {how_to_get('dataset')}"
    return None


def no_rows(path: Path) -> str | None:
    """What was given instead of rows, judged by its beginning, and where it belongs; None for nothing wrong."""
    if zipfile.is_zipfile(path):
        return _of_zip(path)
    with path.open("rb") as file:
        raw = file.read(512)
    for beginning, meaning in NO_ROWS.items():
        if raw.startswith(beginning):
            return meaning
    if raw[8:9] == b"{" and b"\0" in raw[:8]:  # safetensors: the length of a header, and the header
        return WEIGHTS
    if b"\0" in raw and path.suffix != ".parquet" and not raw.lstrip().startswith((b"{", b"[")):
        return "this is not text, so it has no rows"
    return None


def _of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many kinds on damaged files
        names = []
    if "xl/workbook.xml" in names or "xl/workbook.bin" in names:
        return WORKBOOK
    if any(name.endswith("data.pkl") for name in names):  # what torch.save writes
        return WEIGHTS
    if rows := [name for name in names if name.endswith(ROWS)]:
        return f"this is a zip — unpack it and give {rows[0]:.80}"
    stem = path.name.removesuffix(".zip").removesuffix("_images")
    beside = [path.with_name(f"{stem}{ending}") for ending in ("_data.jsonl", *ROWS)]
    rows_here = next((str(file) for file in beside if file.is_file()), "a .jsonl, .json or .parquet")
    return f"this is a zip of image files — give the rows ({rows_here}) here, and the zip with --images"


def no_set(folder: Path) -> str:
    """Why a folder is not a data set, and the next step."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    rows = [path for path in files if path.name.endswith(ROWS)]
    if rows:
        return f"it is a folder with several data sets — give one file, such as {rows[0]}"
    if any(path.suffix.lower() in PICTURE_ENDINGS for path in files):
        return "it is a folder of image files without rows — add a metadata.csv with the columns file_name and text"
    return "it is a folder without rows (no .parquet or .tar file, no metadata.jsonl or .csv)"
