"""Recognise rows that refer to images or videos in an unsupported way; training on them would ignore the image.

Two signs: a key or value that names a picture (`images`, `img_path`, `"file": "a.jpg"`), and a mark other than
`<image>` in the text of a question (`<img>a.jpg</img>`, `<image1>`, `<video>`, `<|image_pad|>`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.rows.row import IMAGE_MARK, PICTURE_BEGINNINGS, Row

KIND = "images not read"
DEPTH, WIDTH = 4, 64  # how deep and how far a value is searched
NAME_LIMIT = 4096  # characters of a text that could be a name

SHOWN = re.compile("(?:image|img|picture|pic|photo|video|clip|frame|visual|jpg|jpeg|png)s?")
# Words that may occur beside those: `image_path` names a picture whatever its value, `image_width` does not.
BESIDE = re.compile(
    "(?:path|file|filename|name|url|uri|link|href|src|id|bytes?|data|base|b|binary|raw|content|list|array|local|remote|"
    "main|first|second|third|left|right|query|input|original|full|hd)s?"
)
CHINESE = re.compile("图片|图像|照片|视频|影像")
ENDING = r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|heif|avif|jfif|ppm|svg|mp4|avi|mov|mkv|webm|mpe?g|m4v|flv|wmv)"
FILE = re.compile(rf"[^\n]*\S{ENDING}(?:[?#]\S*)?", re.IGNORECASE)
# A picture as text: a data URI, or the beginning of a JPEG, PNG, GIF or WebP in base64.
IN_TEXT = re.compile(r"data:(?:image|video)/|/9j/4|iVBORw0KGgo|R0lGODlh|UklGR")
TEXTS = ("role", "content", "reasoning_content", "tools", "tool_calls")  # fields of a message that become text
NOTHING = {"", "none", "null", "nan", "n/a", "na", "-", "[]", "{}", "false", "no"}

_NAME = r"(?:image|img|picture|photo|video)"
MARK = re.compile(
    rf"""
      <img>[^<>\n]{{1,400}}</img>                          # Qwen-VL: the name is in the text
    | <\|[\w\ -]{{0,30}}?(?:{_NAME}|vision)[\w\ -]{{0,30}}\|>  # <|image_1|>, <|vision_start|>, <|video_pad|>
    | <[\w\ -]{{0,30}}?{_NAME}[\w\ -]{{0,30}}/?>           # <video>, <image1>, <ImageHere>, <start_of_image>
    | <{_NAME}\ [^<>\n]{{0,400}}?=[^<>\n]{{1,400}}>         # <img src="a.jpg">
    | (?-i:\[(?:IMG|IMAGE|VIDEO)[ _-]?\d*\])              # Pixtral
    | !\[[^\]\n]{{0,400}}\]\((?:[^()\s]+{ENDING}|data:image/)[^()\n]*\)  # Markdown
    """,
    re.IGNORECASE | re.VERBOSE,
)
TAG = re.compile(rf"</?{_NAME}(?:\ [^<>]*)?/?>", re.IGNORECASE)  # which a web page may have, too
WEB_PAGE = re.compile(
    r"</?(?:a|p|div|span|body|head|html|ul|ol|li|table|tr|td|br|script|style|h[1-6]|form|input|button|source|svg)\b"
    r"|</(?:video|picture)>|\b(?:html5?|css|xml|svg|tags?|elements?)\b|标签|元素",
    re.IGNORECASE,
)


def refuse_unread(row: Row, columns: Mapping[str, Any] | None = None) -> Row:
    """Return the row. Raises RowError where it refers to a picture or video in an unsupported way.

    `columns` are the fields of the row that `extra` does not hold.
    """
    if not isinstance(row.conversations, list):  # the check of the conversation reports it
        return row
    for text in _questions(row.conversations):
        if mark := _unread_mark(text):
            raise RowError(
                f"{mark!r:.80} in its text is not supported: write <image> there, and the image name in `image`",
                KIND,
            )
    if not row.images:
        for tree in (row.extra, columns or {}, *_rests(row.conversations)):
            for key, value in named_in(tree, ""):
                instead = "put the image names into `image`"
                if isinstance(value, bytes):
                    instead = "put the image bytes into a column `image_bytes` (binary, or a list of binary)"
                raise RowError(
                    f"images or videos in `{key:.60}` are not supported: {instead}, and write <image> in the text "
                    "where each belongs",
                    KIND,
                )
    return row


def _questions(conversations: list[Any]) -> Iterator[str]:
    """The texts of all messages but the answers: an answer may mention tags."""
    for message in conversations:
        if isinstance(message, dict) and message.get("role") != "assistant":
            content = message.get("content")
            if isinstance(content, str):
                yield content


def _rests(conversations: list[Any]) -> Iterator[dict[str, Any]]:
    """The other fields of messages than role, content and tools, which become text."""
    for message in conversations:
        if isinstance(message, dict) and len(message) > 2:
            yield {key: value for key, value in message.items() if key not in TEXTS}


def _unread_mark(text: str) -> str | None:
    rest = text.replace(IMAGE_MARK, "")
    if "<" not in rest and "[" not in rest:  # as in nearly every text
        return None
    for match in MARK.finditer(text):
        mark = match[0]
        if mark == IMAGE_MARK or (TAG.fullmatch(mark) and WEB_PAGE.search(text)):
            continue
        if mark[1].isupper() and text[: match.start()][-1:].isidentifier():  # a type: `vector<Image>`
            continue
        return mark
    return None


def named_in(value: Any, key: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The values in a tree that name or hold pictures or videos, by their key; `key` is the key of the tree itself."""
    if isinstance(value, dict) and depth < DEPTH:
        for number, (inner, below) in enumerate(value.items()):
            if number < WIDTH:
                yield from named_in(below, f"{key}.{inner}" if key else str(inner), depth + 1)
    elif isinstance(value, list | tuple) and depth < DEPTH:
        for below in value[:WIDTH]:
            yield from named_in(below, key, depth + 1)
    elif _names_picture(key, value):
        yield key, value


def _names_picture(key: str, value: Any) -> bool:
    """Whether a value, by itself or by its key, names or holds a picture."""
    levels = [_terms(level) for level in key.split(".")]
    while levels and not any(map(_is_shown, levels[0])):  # the keys above say nothing
        levels.pop(0)
    terms = [word for level in levels for word in level]
    shown, only = bool(terms), all(_is_shown(word) or BESIDE.fullmatch(word) for word in terms)
    if isinstance(value, bytes | bytearray | memoryview):
        return len(value) > 0 and (shown or bytes(value[:4]).startswith(PICTURE_BEGINNINGS))
    if isinstance(value, str):
        text = value[:NAME_LIMIT].strip()
        if text.lower() in NOTHING:
            return False
        is_file = FILE.fullmatch(text) is not None and (shown or " " not in text)
        return (shown and only) or is_file or IN_TEXT.match(text) is not None
    if isinstance(value, int) and not isinstance(value, bool):
        return shown and only and value >= 0 and not {"id", "ids"}.isdisjoint(terms)
    return False


def _terms(key: str) -> list[str]:
    """The words of a key, in small letters: `imagePath`, `image_path` and `IMAGE-PATH2` have the same."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", key)
    return [word.lower() for word in re.findall(r"[^\W\d_]+", parted)]


def _is_shown(word: str) -> bool:
    return bool(SHOWN.fullmatch(word) or CHINESE.search(word))
