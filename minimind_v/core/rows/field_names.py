"""The names of the fields of conversations and of pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable

READ = (
    "`conversations` or `messages` of role and content, `texts` of user and assistant, `question` and `answer`, or "
    "`image` and `caption`"
)
TALKS = ("conversations", "messages")
PICTURES = ("image_bytes", "images", "image")  # fields of pictures; the first with any counts
# Fields of pictures where the text has marks for them, or where a caption or a question needs them.
ALTERNATIVES = (
    *("image_path", "image_paths", "image_file", "image_files", "image_filename", "image_name", "image_names"),
    *("file_name", "file_names", "filename", "img", "imgs", "img_path", "picture", "pictures", "photo", "photos"),
    *("file_path", "jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "image_base64", "base64", "image_data"),
    *("image_url", "image_urls", "img_url", "url"),
)
FILE_NAMES = ("_file_name", "_file_names")  # ends of the fields that hold pictures where no other field does
CAPTIONS = ("caption", "captions", "text", "txt", "description", "alt_text")
QUESTIONS = {"question": ("answer", "answers", "response"), "query": ("response", "answer", "answers")}


def is_readable(names: Iterable[str]) -> bool:
    """Whether rows with these fields can have a supported form."""
    names = set(names)
    return (
        not names.isdisjoint((*TALKS, "texts"))
        or any(question in names and not names.isdisjoint(answers) for question, answers in QUESTIONS.items())
        or (not names.isdisjoint(CAPTIONS) and picture_field(names) is not None)
    )


def picture_field(names: Iterable[str]) -> str | None:
    """The first field of pictures."""
    plain = plain_names(names)
    first = next((plain[key] for key in (*PICTURES, *ALTERNATIVES) if key in plain), None)
    return first or next((name for name in plain.values() if name.endswith(FILE_NAMES)), None)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names of fields by their standard spelling: `imagePath` and `Image-Path` by `image_path`."""
    return {re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s-]+", "_", name).lower(): name for name in reversed(list(names))}
