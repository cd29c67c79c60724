"""Picture files as users name them: paths, files dropped on a terminal, and addresses."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes

from PIL import Image

from minimind_v.core.data.images import FORMATS
from minimind_v.core.errors import MissingInput, MmvError, UsageError, shorten
from minimind_v.core.hub.sources import PICTURE_ENDINGS
from minimind_v.core.rows.cells import decode_base64
from minimind_v.core.rows.row import IMAGE_MARK
from minimind_v.core.wording import plural

SHOWN = 120  # characters of a name
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)  # longer than the letter of a drive
LOCAL = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.IGNORECASE | re.DOTALL)
INLINE = re.compile(r"data:([^,]*),(.*)", re.IGNORECASE | re.DOTALL)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
NAME_END = re.compile(rf"(?:{'|'.join(map(re.escape, ENDINGS))})(?=\s|$)", re.IGNORECASE)
WORD = r"""(?:'[^']*'|"[^"]*"|\\.|[^\s'"\\])+"""  # as a shell reads it
FIRST, LAST, SPACE = re.compile(rf"{WORD}(?!\S)"), re.compile(rf"(?<!\S){WORD}$"), re.compile(r"\s+")
LONGEST = 4096  # characters of a name


@dataclass(frozen=True)
class Picture:
    """A picture file, not yet decoded, and its name as messages show it."""

    name: str
    data: bytes


def split_names(text: str) -> list[str]:
    """The names in a typed or dropped text: one file as it stands, or several, quoted or escaped as for a shell."""
    whole = text.strip()
    if not whole or _exists(whole, folder=True) or INLINE.match(whole):
        return [whole] if whole else []
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if os.name == "nt":
        lexer.escape = ""  # a backslash is part of a path
    try:
        names = list(lexer)
    except ValueError:  # an open quote
        return [whole]
    if len(names) > 1 and not any(_exists(name, True) or ADDRESS.match(name) or "*" in name for name in names):
        return [whole]  # one name with spaces, and no such file
    return names


def files_of(name: str) -> list[str] | None:
    """The picture files of a folder, or the files that a pattern with `*`, `?` or `[` matches, sorted.

    None for any other name. Raises MissingInput for a folder or a pattern without files.
    """
    if ADDRESS.match(name) and not LOCAL.match(name):
        return None
    try:
        path = _path(name)
        if path.is_dir():
            inside = sorted(str(file) for file in path.iterdir() if _may_be_picture(file))
            if not inside:
                raise MissingInput(f"no image file in the folder {shorten(name, SHOWN)}")
            return inside
        if not glob.has_magic(name) or os.path.lexists(path):
            return None
        files = sorted(file for file in glob.glob(str(path), recursive=True) if os.path.isfile(file))
    except (OSError, ValueError):  # a name too long, no rights, a zero byte: reading it reports that
        return None
    if not files and not set(name) & set("*["):
        return None  # a question mark in a name
    if not files:
        raise MissingInput(f"no file matches {shorten(name, SHOWN)}")
    return files


def _may_be_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_ENDINGS and not file.name.startswith(".") and file.is_file()


def read_pictures(names: Iterable[str], read: Callable[[str], Picture] | None = None) -> list[Picture]:
    """Read all files, each by `read`. Raises MissingInput or UsageError that names every file that cannot be read."""
    pictures: list[Picture] = []
    errors: list[MmvError] = []
    for name in names:
        try:
            pictures.append((read or read_picture)(name))
        except MmvError as error:
            errors.append(error)
    if errors:
        if all(isinstance(error, MissingInput) for error in errors):
            raise MissingInput(*map(str, errors))
        raise UsageError("; ".join(map(str, errors)))
    return pictures


def read_picture(name: str) -> Picture:
    """Read a path or a file: address, or decode the content of a data: address.

    Raises MissingInput if the file cannot be read, UsageError for other addresses.
    """
    if not name.strip():
        raise UsageError("the name of an image is empty — name an image file")
    shown = shorten(name, SHOWN)
    if not _exists(name):
        if inline := INLINE.fullmatch(name):
            return Picture(shown, _inline(shown, *inline.groups()))
        if name.lower().startswith("data:"):
            raise UsageError(f"{shown}: a data: address without content — the form is data:image/png;base64,CONTENT")
        if ADDRESS.match(name) and not LOCAL.match(name):
            raise UsageError(
                f"{shown} is a web address — download it first (curl -LO ADDRESS), then give the file's name"
            )
    path = _path(name)
    if LOCAL.match(name):
        shown = shorten(str(path), SHOWN)
    try:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURE_ENDINGS)
            example = f", for example {inside[0]}" if inside else ""
            raise MissingInput(f"{shown} is a folder — name an image file in it{example}")
        if not path.is_file():
            raise MissingInput(f"no image file at {shown}")
        return Picture(shown, path.read_bytes())
    except PermissionError:
        raise MissingInput(f"no permission to read the image file {shown}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a name
        raise MissingInput(f"no image file at {shown} ({getattr(error, 'strerror', None) or error})") from None


def pictures_in(text: str) -> list[str]:
    """The names in a question that consists of picture files only; empty for any other question."""
    names = split_names(text)
    are_pictures = [_exists(name) and _is_picture(_path(name)) for name in names]
    alone = len(names) == 1 and " " not in names[0]
    ending = alone and (names[0].lower().endswith(ENDINGS) or names[0].lower().startswith("data:image/"))
    return names if names and (all(are_pictures) or ending) else []


def split_line(text: str) -> tuple[list[str], str]:
    """The picture files at the beginning and at the end of a typed line, and the question beside them."""
    text, before, behind = text.strip(), list[str](), list[str]()
    if len(text) <= LONGEST and (names := pictures_in(text)):
        return names, ""
    while end := _end_of_first(text):
        before.append(text[:end])
        text = text[end:].lstrip()
    while (begin := _begin_of_last(text, with_spaces=not behind)) is not None:
        behind.insert(0, text[begin:])
        text = text[:begin].rstrip()
    return [name for written in before + behind for name in split_names(written)], text


def _end_of_first(text: str) -> int:
    """Where the picture's name at the beginning of a text ends; 0 without one."""
    if (word := FIRST.match(text)) and pictures_in(word[0]):
        return word.end()
    ends = (name.end() for name in NAME_END.finditer(text, 0, LONGEST))  # spaces that are not quoted
    return next((end for end in ends if _exists(text[:end])), 0)


def _begin_of_last(text: str, with_spaces: bool) -> int | None:
    """Where the picture's name at the end of a text begins: one `with_spaces` that are not quoted, or a word."""
    window = max(0, len(text) - LONGEST)
    word = LAST.search(text, window)
    if not word or not (names := pictures_in(word[0])):
        return None
    begins = SPACE.finditer(text, window) if with_spaces and not _exists(names[0]) else ()
    return next((space.end() for space in begins if _exists(text[space.end() :])), word.start())


def check_question(question: str, images: int) -> None:
    """Raises UsageError if a question is empty, or its marks differ in number from its images."""
    if not question.strip():
        raise UsageError("the question is empty — write what you ask, such as 'What is in the image?'")
    marks = question.count(IMAGE_MARK)
    if marks and marks != images:
        raise UsageError(f"the question has {plural(marks, f'{IMAGE_MARK} mark')} for {plural(images, 'image')}")


def _path(name: str) -> Path:
    """The path of a name or of a file: address."""
    if not os.path.lexists(name) and (local := LOCAL.fullmatch(name)):
        path = local[1]
        if not os.path.lexists(path):  # else the address has no percent encoding
            path = os.fsdecode(unquote_to_bytes(path.encode(errors="surrogateescape")))
        return Path(path[1:] if os.name == "nt" else path)
    return Path(name if os.path.lexists(name) else os.path.expanduser(name))


def _exists(name: str, folder: bool = False) -> bool:
    """Whether a name is that of a file, or of a folder where that counts."""
    try:
        return _path(name).is_file() or (folder and _path(name).is_dir())
    except (OSError, ValueError):
        return False


def _is_picture(path: Path) -> bool:
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # Pillow raises many kinds
        return path.suffix.lower() in ENDINGS


def _inline(shown: str, head: str, body: str) -> bytes:
    """The content of a data: address."""
    data = unquote_to_bytes(body)
    if head.lower().split(";")[-1].strip() != "base64":
        return data
    try:
        return decode_base64(data.decode("latin-1"))
    except ValueError:
        raise UsageError(f"{shown}: its base64 is damaged or cut — copy the whole address again") from None
