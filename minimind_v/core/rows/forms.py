"""The forms in which a row's conversation and pictures are written, each brought to the one form that is used.

A row comes as its fields, whatever file they stand in. `FORMS` says in which forms a conversation is read, in order;
`cells.py` says what a cell of pictures may be. What is not read is refused by `unread.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.rows.cells import (
    BYTES_KEYS,
    NAME_KEYS,
    Picture,
    StoredPictures,
    picture_of_element,
    pictures_of,
    records_of,
)
from minimind_v.core.rows.row import (
    ANSWER_FIRST,
    IMAGE_MARK,
    MARK_PER_TURN,
    SEVERAL_ANSWERS,
    SEVERAL_CAPTIONS,
    Row,
    count_marks,
    image_names,
    parse_json,
)
from minimind_v.core.rows.unread import KIND, named_in, refuse_unread

READ = (
    "`conversations` or `messages` of role and content, `texts` of user and assistant, `question` and `answer`, or "
    "`image` and `caption`"
)
TALKS = ("conversations", "messages")
PICTURES = ("image_bytes", "images", "image")  # fields of pictures, the first that has any counts
# Fields that hold pictures where the text has marks for them, or where a caption or a question needs them.
ALTERNATIVES = (
    *("image_path", "image_paths", "image_file", "image_files", "image_filename", "image_name", "image_names"),
    *("file_name", "file_names", "filename", "img", "imgs", "img_path", "picture", "pictures", "photo", "photos"),
    *("file_path", "jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "image_base64", "base64", "image_data"),
    *("image_url", "image_urls", "img_url", "url"),
)
FILE_NAMES = ("_file_name", "_file_names")  # ends of the fields that all hold pictures, where no other does
CAPTIONS = ("caption", "captions", "text", "txt", "description", "alt_text")
QUESTIONS = {"question": ("answer", "answers", "response"), "query": ("response", "answer", "answers")}
MOST_IMAGES = 10_000  # of a row: 32768 positions hold fewer
DESCRIBE, DESCRIBE_CHINESE = "Describe this image.", "描述这张图片。"
ROLES = {
    **dict.fromkeys(("user", "human", "usr", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "chatbot", "ai", "answer"), "assistant"),
    "system": "system",
}
PART_TEXT = ("text", "input_text", "output_text")
PART_IMAGE = ("image", "image_url", "input_image", "image_path", "image_base64", "img")
_HAN, _LATIN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"), re.compile("[A-Za-z\u00c0-\u024f]+")


@dataclass
class Talk:
    """A conversation, and what its form says of its pictures."""

    messages: Any
    form: str
    parts: list[Any] | None = None  # for each mark what its part says of its picture; None without parts
    leads: bool = False  # the pictures stand before the first question where no mark says otherwise
    needs: bool = False  # without a picture it says nothing
    notes: list[str] = field(default_factory=list)


class _Next:
    """What a part says that shows the next picture of the row."""


NEXT = _Next()


@dataclass(frozen=True)
class Form:
    """A form of conversation: whether a row's fields have it, and how it is read; `read` removes what it uses."""

    name: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[dict[str, Any]], Talk]


def read_row(fields: Mapping[str, Any]) -> Row:
    """The row that these fields are. Raises RowError where they say something that is not read.

    A row without a conversation has None for it; whoever uses the row raises `no_form`.
    """
    text = fields.get("conversations")
    if type(text) is str and text.startswith("["):
        fields = {**fields, "conversations": parse_json(text, "`conversations` is ")}
    try:
        row = _usual_row(fields) or _read_fields(fields)
    except RecursionError:
        raise RowError("nested too deeply", "json") from None
    if len(row.images) > MOST_IMAGES:
        raise RowError(f"{len(row.images):,} pictures, and a row has at most {MOST_IMAGES:,}", "image")
    return refuse_unread(row)


def _read_fields(fields: Mapping[str, Any]) -> Row:
    rest = dict(fields)
    form = next((form for form in FORMS if form.fits(rest)), None)
    if form is None:
        talk = Talk(None, "")
        for key in TALKS:
            rest.pop(key, None)
    else:
        talk = form.read(rest)
        _put_system(rest, talk)
    key, pictures = _row_pictures(rest, talk)
    shown = _place(talk, pictures)
    if key and talk.form:
        talk.form = f"{key} + {talk.form}" if talk.form in CAPTIONS else f"{talk.form} + {key}"
    images = [f"picture {number}" if picture.name is None else picture.name for number, picture in enumerate(shown, 1)]
    inline = {position: picture.data for position, picture in enumerate(shown) if picture.data is not None}
    return Row(talk.messages, images, rest, inline, tuple(talk.notes), talk.form)


def _put_system(fields: dict[str, Any], talk: Talk) -> None:
    """A field `system`, as LLaMA-Factory has it, is the first message, unless the conversation has one of its own."""
    text, messages = fields.get("system"), talk.messages
    if isinstance(text, str) and text.strip() and isinstance(messages, list) and messages:
        first = messages[0]
        if isinstance(first, dict) and first.get("role") == "user":
            talk.messages = [{"role": "system", "content": text}, *messages]
            del fields["system"]


def _usual_row(fields: Mapping[str, Any]) -> Row | None:
    """A row of the forms that published data has, by the million; None for any other, which takes longer to read."""
    key = "conversations" if "conversations" in fields else "messages"
    messages = fields.get(key)
    if type(messages) is not list or not messages or "system" in fields:
        return None
    if key == "conversations" and "messages" in fields:
        return None
    try:
        if "from" in messages[0]:
            messages = [
                {"role": _LLAVA_ROLES[message["from"]], "content": message["value"]}
                for message in messages
                if len(message) == 2 or _LLAVA_ROLES[""]  # no more keys, or a KeyError
            ]
        marks = 0
        for message in messages:
            text = message["content"]
            if len(message) != 2 or message["role"] not in _STANDARD or type(text) is not str:
                return None
            marks += text.count(IMAGE_MARK)
    except (KeyError, TypeError, AttributeError):
        return None
    first = messages[messages[0]["role"] == "system" and len(messages) > 1]
    if first["role"] == "assistant" or (marks > 1 and len(messages) > 2):
        return None
    extra = dict(fields)
    del extra[key]
    images: list[str] = []
    inline: dict[int, Any] = {}
    form = key
    for name in PICTURES:
        if name not in extra:
            continue
        if form != key:  # two fields of pictures
            return None
        value, form = extra.pop(name), f"{key} + {name}"
        if type(value) is str and "://" not in value and not value.startswith(_DATA):
            images = image_names(value)
        elif isinstance(value, StoredPictures):
            images = [f"picture {number}" for number in range(1, (marks or value.count()) + 1)]
            inline = dict(enumerate(range(len(images))))
        elif value is not None:
            return None
    if marks and not images:
        return None
    return Row(messages, images, extra, inline, (), form if images else key)


_STANDARD = ("system", "user", "assistant")
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_DATA = ("data:", "/9j/", "iVBOR", "R0lG", "UklGR")


def no_form(row: Row) -> RowError:
    """The error over a row that has no conversation."""
    for key in (*CAPTIONS, *(answer for answers in QUESTIONS.values() for answer in answers)):
        if key in row.extra and row.extra[key] in (None, "", []):
            return RowError(f"`{key}` is empty", "conversations")
    names = ", ".join([*row.extra, *(["image"] if row.images else [])])
    return RowError(f"no conversation in {names or 'an empty row':.300} — a row has {READ}", "conversations")


def is_readable(names: Iterable[str]) -> bool:
    """Whether rows with these fields can be of a form that is read."""
    names = set(names)
    return (
        not names.isdisjoint((*TALKS, "texts"))
        or any(question in names and not names.isdisjoint(answers) for question, answers in QUESTIONS.items())
        or (not names.isdisjoint(CAPTIONS) and picture_field(names) is not None)
    )


def picture_field(names: Iterable[str]) -> str | None:
    """The first of the fields that pictures are read from."""
    plain = _plain(names)
    first = next((plain[key] for key in (*PICTURES, *ALTERNATIVES) if key in plain), None)
    return first or next((name for name in plain.values() if name.endswith(FILE_NAMES)), None)


def _plain(names: Iterable[str]) -> dict[str, str]:
    """Names of fields by how they are spelt here: `imagePath` and `Image-Path` by `image_path`."""
    return {re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s-]+", "_", name).lower(): name for name in reversed(list(names))}


# --- conversations ----------------------------------------------------------------------------------------------------


def _talk_key(fields: Mapping[str, Any]) -> str | None:
    """The field of the conversation: the first that has one, or is there."""
    there = [key for key in TALKS if fields.get(key) is not None]
    return next((key for key in there if fields[key]), there[0] if there else None)


def _talk_is(*kinds: type) -> Callable[[Mapping[str, Any]], bool]:
    return lambda fields: (key := _talk_key(fields)) is not None and isinstance(fields[key], kinds)


def _read_messages(fields: dict[str, Any]) -> Talk:
    """`conversations` or `messages`: a list of messages, or what is none, as it is."""
    key = _talk_key(fields)
    assert key is not None
    talk = _messages(fields.pop(key), key)
    for other in TALKS:
        if fields.get(other, 0) is None:
            del fields[other]
    return talk


def _read_json(fields: dict[str, Any]) -> Talk:
    """The same as JSON text."""
    key = _talk_key(fields)
    assert key is not None
    text = fields[key]
    if text[:64].lstrip()[:1] not in ("[", "{", b"[", b"{"):  # some text, which is no conversation
        return Talk(fields.pop(key), key)
    fields[key] = parse_json(text, f"`{key}` is ")
    if isinstance(fields[key], dict):
        fields[key] = records_of(fields[key])
    return _read_messages(fields) if fields[key] is not None else Talk(fields.pop(key), key)


def _read_lists(fields: dict[str, Any]) -> Talk:
    """The same as a record of lists: `{"role": [...], "content": [...]}`."""
    key = _talk_key(fields)
    assert key is not None
    fields[key] = records_of(fields[key])
    return _read_messages(fields)


def _messages(value: Any, form: str) -> Talk:
    talk = Talk(value, form)
    if not isinstance(value, list):
        return talk
    plain = True  # no message has parts
    messages = []
    for message in value:
        if type(message) is not dict or not (
            len(message) == 2 and message.get("role") in _STANDARD and type(message.get("content")) is str
        ):
            message = _message(message)
            plain = plain and not (isinstance(message, dict) and isinstance(message.get("content"), list | dict))
        messages.append(message)
    talk.messages = messages
    if not plain:
        talk.form = f"{form} of parts"
        talk.parts = []
        for number, message in enumerate(messages, 1):
            if isinstance(message, dict):
                talk.parts += _join_parts(message, number)
    _drop_answer(talk)
    return talk


def _message(message: Any) -> Any:
    """A message under our names: `from` and `value` are `role` and `content`, roles are ours, no field is null."""
    if not isinstance(message, dict):
        return message
    role_key = "role" if message.get("role") is not None else "from"
    text_key = "content" if message.get("content") is not None else "value"
    if role_key not in message and text_key not in message:
        return message
    role = message.get(role_key)
    rest = {
        key: value
        for key, value in message.items()
        if key not in ("role", "content", role_key, text_key) and value is not None
    }
    role = ROLES.get(role.strip().lower(), role) if isinstance(role, str) else role
    return {"role": role, "content": message.get(text_key), **rest}


def _drop_answer(talk: Talk) -> None:
    """An answer that no question stands before is dropped, as where a conversation begins with `gpt`."""
    messages = talk.messages
    first = 1 if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system" else 0
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages[first : first + 2]]
    if roles == ["assistant", "user"]:
        content = messages[first].get("content")
        if talk.parts is not None and isinstance(content, str):
            before = count_marks(messages[:first])
            del talk.parts[before : before + content.count(IMAGE_MARK)]
        del messages[first]
        talk.notes.append(ANSWER_FIRST)


def _join_parts(message: dict[str, Any], number: int) -> list[Any]:
    """Make a message's parts its text, with a mark for each picture; returns what is said of each of these."""
    content = message.get("content")
    if isinstance(content, str):
        return [NEXT] * content.count(IMAGE_MARK)
    text, pictures = "", []
    for part in content if isinstance(content, list) else [content]:
        piece, shows = _part(part, number)
        if text and piece and not (text[-1].isspace() or piece[0].isspace()):
            text += "\n"
        text += piece
        pictures += shows
    message["content"] = text
    return pictures


def _part(part: Any, number: int) -> tuple[str, list[Any]]:
    """The text of a part, a mark for a picture, and what the part says of each of its pictures. Raises RowError."""
    if isinstance(part, str):
        return part, [NEXT] * part.count(IMAGE_MARK)
    if not isinstance(part, dict):
        raise RowError(f"message {number} has a part that is neither text nor a picture", "conversations")
    there = {key: value for key, value in part.items() if value not in (None, "", [], {})}
    kind = there.get("type") or ("text" if isinstance(there.get("text"), str) else next(iter(there), None))
    kind = kind.lower() if isinstance(kind, str) else kind
    if kind in PART_TEXT and not any(key in there for key in PART_IMAGE):
        text = there.get("text", there.get("content", ""))
        if not isinstance(text, str):
            raise RowError(f"message {number} has a part of text without one", "conversations")
        return text, [NEXT] * text.count(IMAGE_MARK)
    own = next((there[key] for key in NAME_KEYS if key in there), None)
    if any(key in there for key in BYTES_KEYS):
        own = there
    index = there.get("index")
    if kind not in PART_IMAGE or (own is None and index is None and any(True for _ in named_in(there, ""))):
        raise RowError(
            f"message {number} has a part of type {kind!r:.40}, which is not read: text, image and image_url are", KIND
        )
    if own is None:
        own = index if isinstance(index, int) and not isinstance(index, bool) else NEXT
    return IMAGE_MARK, [own]


def _read_texts(fields: dict[str, Any]) -> Talk:
    """`texts` of user and assistant, as the_cauldron and nanoVLM have them; the pictures stand before all of it."""
    value = fields.pop("texts")
    messages: list[dict[str, Any]] = []
    for turn in records_of(value) if isinstance(value, dict) else value:
        if not isinstance(turn, dict) or not isinstance(turn.get("user"), str):
            raise RowError("`texts` is not a list of user and assistant", "conversations")
        if turn.get("system") and not messages:
            messages.append({"role": "system", "content": turn["system"]})
        messages.append({"role": "user", "content": turn["user"]})
        messages.append({"role": "assistant", "content": turn.get("assistant")})
    return Talk(messages, "texts", leads=True)


def _has_texts(fields: Mapping[str, Any]) -> bool:
    texts = fields.get("texts")
    if isinstance(texts, dict):
        return isinstance(texts.get("user"), list)
    return isinstance(texts, list) and bool(texts) and isinstance(texts[0], dict) and "user" in texts[0]


def _question(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    for question, answers in QUESTIONS.items():
        if isinstance(fields.get(question), str):
            for answer in answers:
                if fields.get(answer) not in (None, "", []):
                    return question, answer
    return None


def _read_question(fields: dict[str, Any]) -> Talk:
    """A question and its answer, or the first of its answers, each in a field; the pictures stand before them.

    Turns before these may stand in `history`, as ms-swift has them.
    """
    keys = _question(fields)
    assert keys is not None
    question, answer = (fields.pop(key) for key in keys)
    text, several = _first_text(answer, keys[1])
    turns = [*_turns_before(fields), (question, text)]
    messages = [
        {"role": role, "content": said} for turn in turns for role, said in zip(_STANDARD[1:], turn, strict=True)
    ]
    return Talk(messages, " + ".join(keys), leads=True, notes=[SEVERAL_ANSWERS] if several else [])


def _turns_before(fields: dict[str, Any]) -> list[Any]:
    """The questions and answers of `history`; a text is none, but a note such as a patient's. Raises RowError."""
    turns = fields.get("history")
    if isinstance(turns, str) and turns.startswith("["):
        turns = parse_json(turns, "`history` is ")
    if not isinstance(turns, list):
        return []
    del fields["history"]
    for turn in turns:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowError("`history` is no list of pairs of a question and its answer", "conversations")
    return turns


def _caption_key(fields: Mapping[str, Any]) -> str | None:
    return next((key for key in CAPTIONS if fields.get(key) and isinstance(fields[key], str | list)), None)


def _has_caption(fields: Mapping[str, Any]) -> bool:
    return _caption_key(fields) is not None and (
        _find_pictures(fields, (*PICTURES, *ALTERNATIVES)) is not None
        or any(name.endswith(FILE_NAMES) for name in fields)
    )


def _read_caption(fields: dict[str, Any]) -> Talk:
    """A picture and its caption, or the first of its captions: the answer to a request to describe the picture."""
    key = _caption_key(fields)
    assert key is not None
    text, several = _first_text(fields.pop(key), key)
    chinese = len(_HAN.findall(text)) > len(_LATIN.findall(text))
    question = DESCRIBE_CHINESE if chinese else DESCRIBE
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return Talk(messages, key, leads=True, needs=True, notes=[SEVERAL_CAPTIONS] if several else [])


def _first_text(value: Any, key: str) -> tuple[str, bool]:
    """The first text of a value, and whether there are more. Raises RowError."""
    texts = value if isinstance(value, list) else [value]
    first = texts[0] if texts else None
    if isinstance(first, dict):  # as VQA has its answers
        first = next((first[name] for name in (key.removesuffix("s"), "answer", "raw", "text") if name in first), None)
    if isinstance(first, int | float):
        raise RowError(f"`{key}` is the number {first:.12g} — write it as text", "conversations")
    if not isinstance(first, str):
        raise RowError(f"`{key}` is neither a text nor a list of texts", "conversations")
    return first, len(texts) > 1


FORMS = (
    Form("messages", _talk_is(list), _read_messages),
    Form("JSON text of messages", _talk_is(str, bytes), _read_json),
    Form("struct of lists", _talk_is(dict), _read_lists),
    Form("no messages", lambda fields: _talk_key(fields) is not None, _read_messages),
    Form("texts", _has_texts, _read_texts),
    Form("question + answer", lambda fields: _question(fields) is not None, _read_question),
    Form("image + caption", _has_caption, _read_caption),
)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _find_pictures(fields: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of the fields that holds pictures, however its name is spelt."""
    plain = _plain(fields)
    for key in keys:
        value = fields.get(plain.get(key, key))
        if isinstance(value, StoredPictures) or any(True for _ in named_in(value, key)):
            return plain.get(key, key)
    return None


def _row_pictures(fields: dict[str, Any], talk: Talk) -> tuple[str, list[Picture] | StoredPictures]:
    """The field of the row's pictures, and these. Raises RowError where two fields differ."""
    key, pictures = "", []  # type: str, list[Picture] | StoredPictures
    for name in PICTURES:
        if name not in fields:
            continue
        value = fields.pop(name)
        others = value if isinstance(value, StoredPictures) else pictures_of(value, name)
        if others and not pictures:
            key, pictures = name, others
        elif others:
            pictures = _same_pictures(pictures, others, key, name)
    if not pictures and (talk.leads or (not talk.parts and count_marks(talk.messages))):
        alternative = _find_pictures(fields, ALTERNATIVES)
        if alternative is not None:
            value = fields.pop(alternative)
            return alternative, value if isinstance(value, StoredPictures) else pictures_of(value, alternative)
        named = [name for name in fields if name.endswith(FILE_NAMES)]
        pictures = [picture for name in named for picture in pictures_of(fields.pop(name), name)]
        key = " + ".join(named)
    return key, pictures


def _same_pictures(
    first: list[Picture] | StoredPictures, second: list[Picture] | StoredPictures, *keys: str
) -> list[Picture] | StoredPictures:
    """The pictures that two fields have, of one their data and of the other their names. Raises RowError."""
    if isinstance(first, StoredPictures) and not isinstance(second, StoredPictures):
        return [Picture(picture.name, number) for number, picture in enumerate(second)]
    if not isinstance(first, StoredPictures) and not isinstance(second, StoredPictures):
        if first == second:
            return first
        if len(first) == len(second):
            pairs = list(zip(first, second, strict=True))
            if all((one.data is None) != (other.data is None) for one, other in pairs):
                return [one if one.data is not None else other for one, other in pairs]
    raise RowError(f"`{keys[0]}` and `{keys[1]}` have different pictures — leave one of them", "image")


# --- marks and pictures -----------------------------------------------------------------------------------------------


def _place(talk: Talk, pictures: list[Picture] | StoredPictures) -> list[Picture]:
    """The pictures of a row in the order of its marks; marks are put where the form says that pictures stand."""
    messages = talk.messages
    if talk.parts and any(part is not NEXT for part in talk.parts):
        return _named_by_parts(talk.parts, _counted(pictures))
    if isinstance(pictures, StoredPictures):
        # As many as the text has marks, which is found out when one is read; nobody would read one of a text row.
        marks = count_marks(messages)
        trusted = marks == 1 or (marks > 1 and not _mark_in_each_question(messages))
        pictures = _counted(pictures, marks if trusted else None)
    if talk.needs and not pictures:
        raise RowError(f"the row has a `{talk.form}` and no picture", "picture missing")
    if not pictures or not isinstance(messages, list):
        return pictures
    if talk.leads and messages and not count_marks(messages):
        first = next(number for number, message in enumerate(messages) if message["role"] == "user")
        question = messages[first]["content"]
        messages[first] = {"role": "user", "content": f"{IMAGE_MARK}\n" * len(pictures) + question}
    elif len(pictures) == 1 and len(messages) > 2 and _mark_in_each_question(messages):
        questions = [number for number, message in enumerate(messages) if message["role"] == "user"]
        for number in questions[1:]:
            messages[number] = {**messages[number], "content": _without_mark(messages[number]["content"])}
        talk.notes.append(MARK_PER_TURN)
    return pictures


def _counted(pictures: list[Picture] | StoredPictures, count: int | None = None) -> list[Picture]:
    if not isinstance(pictures, StoredPictures):
        return pictures
    return [Picture(None, number) for number in range(pictures.count() if count is None else count)]


def _mark_in_each_question(messages: Any) -> bool:
    """Whether there are several questions, each with one mark, and no mark anywhere else."""
    questions = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        is_question = isinstance(content, str) and message.get("role") == "user"
        if not isinstance(content, str) or content.count(IMAGE_MARK) != is_question:
            return False
        questions += is_question
    return questions > 1


def _without_mark(text: str) -> str:
    before, _, behind = text.partition(IMAGE_MARK)
    return before.removesuffix("\n") if not behind else before + (behind if before else behind.removeprefix("\n"))


def _named_by_parts(parts: list[Any], pictures: list[Picture]) -> list[Picture]:
    """The picture of each mark where parts say which: by its number in the row, or by itself. Raises RowError."""
    own = {}
    for position, part in enumerate(parts):
        if part is not NEXT and not isinstance(part, int):
            shown = pictures_of(part, "content") if not isinstance(part, str) else picture_of_element(part, "content")
            if len(shown) != 1:
                raise RowError("a part of a message shows no picture, or several", "placeholders")
            own[position] = shown[0]
    if own:
        return _beside_own(parts, own, pictures)
    indices = [part for part in parts if part is not NEXT]
    rest = [number for number in range(len(pictures)) if number not in indices]
    order = [rest.pop(0) if part is NEXT and rest else part for part in parts]
    if rest or not all(isinstance(number, int) and 0 <= number < len(pictures) for number in order):
        raise RowError(f"its parts show {len(set(order))} pictures, the row has {len(pictures)}", "placeholders")
    return [pictures[number] for number in order]


def _beside_own(parts: list[Any], own: dict[int, Picture], pictures: list[Picture]) -> list[Picture]:
    """The picture of each mark where some parts have their own, and the row may have them again. Raises RowError."""
    if len(pictures) == len(parts):
        for position, picture in own.items():
            listed = pictures[position]
            if picture.data is None and listed.data is None and _file(picture.name) != _file(listed.name):
                break
        else:
            return [
                own[position] if position in own and listed.data is None else listed
                for position, listed in enumerate(pictures)
            ]
    others = [number for number in range(len(parts)) if number not in own]
    names = {_file(picture.name) for picture in own.values()}
    if not others and all(picture.data is None and _file(picture.name) in names for picture in pictures):
        return list(own.values())
    if len(others) != len(pictures):
        raise RowError(
            f"its parts show {len(parts)} pictures, {len(own)} of them their own, and the row has {len(pictures)} more",
            "placeholders",
        )
    return [own[position] if position in own else pictures.pop(0) for position in range(len(parts))]


def _file(name: str | None) -> str:
    return (name or "").replace("\\", "/").rsplit("/", 1)[-1]
