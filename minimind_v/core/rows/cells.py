"""Image cells of a table: names, bytes, base64 text, data URIs, records of these, or lists."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.rows.row import check_names, check_size, image_names
from minimind_v.core.rows.unread import IN_TEXT, KIND

# Keys of a picture's bytes, and of its name, in a content item or in a record of a cell.
BYTES_KEYS = ("bytes", "base64", "data", "b64_json")
NAME_KEYS = ("path", "image", "image_url", "url", "image_path", "file_name", "filename", "file", "file_path", "source")
REMOTE = re.compile(r"(?:https?|s3|gs|ftp|hdfs)://", re.IGNORECASE)
DATA_URI = re.compile(r"data:(?:[^,]{0,200};base64,|(?:image|video)/)", re.IGNORECASE)  # `data:x.png` is a name
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
BASE64_LEAST = 64  # characters; a shorter text may be a name


@dataclass(frozen=True)
class Picture:
    """A picture of a row by its name or its data: bytes, base64 text, a data URI, or its number in a column."""

    name: str | None
    data: Any = None


class StoredPictures(Sequence[Picture]):
    """Pictures in a column that is read only for their bytes, by their number in it; `count` counts them.

    Whether there are any is not asked: a text row has a picture that fills its column, and never reads it.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count()

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, number: Any) -> Any:
        return Picture(None, range(len(self))[number])


def pictures_of(value: Any, key: str, one_name: bool = False) -> Sequence[Picture]:
    """The pictures of a cell: none, a name, bytes, base64 text, a data URI, a record or a list. Raises RowError.

    With `one_name`, as in a list, a text is one name, commas included.
    """
    if value is None or value == "":
        return []
    if isinstance(value, StoredPictures):
        return value
    if isinstance(value, str):
        if _data_in(value):
            return [Picture(None, value)]
        if REMOTE.match(value.strip()):
            raise RowError(
                f"{value:.200}: mmv does not download images — download it and write the file name instead", KIND
            )
        return [Picture(name) for name in (check_names([value]) if one_name else image_names(value))]
    if isinstance(value, bytes | bytearray | memoryview):
        return [Picture(None, bytes(value))] if len(value) else []
    if isinstance(value, dict):
        return _of_record(value, key)
    if isinstance(value, list | tuple):
        return [picture for cell in value for picture in pictures_of(cell, key, one_name=True)]
    raise RowError(f"`{key}` must be a text with image names", "image")


def _data_in(text: str) -> bool:
    """Whether a text is a picture, not a name."""
    if DATA_URI.match(text):
        return True
    return len(text) >= BASE64_LEAST and IN_TEXT.match(text) is not None and BASE64.fullmatch(text[:1024]) is not None


def _of_record(record: dict[str, Any], key: str) -> Sequence[Picture]:
    """The picture of a record such as `{"bytes": …, "path": …}`: its bytes if any, else its name."""
    for name in (*BYTES_KEYS, *NAME_KEYS):
        value = record.get(name)
        if value is None or value == "" or (isinstance(value, bytes) and not value):
            continue
        if isinstance(value, list) and len(record) > 1 and all(isinstance(other, list) for other in record.values()):
            return pictures_of(records_of(record), key)
        if isinstance(value, str) and name in BYTES_KEYS:
            return [Picture(None, value)]
        return pictures_of(value, f"{key}.{name}", one_name=True)
    if any(record.values()):
        raise RowError(f"`{key}` has {', '.join(map(str, record))}, but needs bytes, path or url", "image")
    return []


def decode_inline(data: Any, name: str) -> bytes:
    """The bytes of a picture in its row. Raises RowError."""
    if isinstance(data, str):
        text = data.partition(",")[2] if data.startswith("data:") else data
        check_size(name, len(text) * 3 // 4)
        try:
            data = decode_base64(text)
        except ValueError as error:
            raise RowError(f"{name}: not base64 ({error})", "image broken") from None
    check_size(name, len(data))
    return bytes(data)


def decode_base64(text: str) -> bytes:
    """The bytes of base64, also in the alphabet of addresses, on several lines or unpadded. Raises ValueError."""
    text = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def data_uri(data: bytes, kind: str) -> str:
    """A picture file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def records_of(lists: dict[str, Any]) -> Any:
    """Turn a record of lists into a list of records. Raises RowError where the lists differ in length."""
    columns = {key: value for key, value in lists.items() if isinstance(value, list)}
    if not columns:
        return lists
    if len({len(column) for column in columns.values()}) > 1:
        raise RowError(f"the lists {', '.join(columns)} have different lengths", "conversations")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
