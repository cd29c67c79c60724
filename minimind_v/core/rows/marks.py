"""Find the pictures of a row in its fields, and sort them by the marks in its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.rows.cells import Picture, StoredPictures, pictures_of
from minimind_v.core.rows.field_names import ALTERNATIVES, FILE_NAMES, PICTURES, plain_names
from minimind_v.core.rows.messages import NEXT, Conversation
from minimind_v.core.rows.row import IMAGE_MARK, MARK_IN_ANSWER, MARK_PER_TURN, count_marks
from minimind_v.core.rows.unread import named_in
from minimind_v.core.wording import plural


def filled_picture_field(fields: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first field that holds pictures, in any spelling of its name."""
    plain = plain_names(fields)
    for key in keys:
        value = fields.get(plain.get(key, key))
        if isinstance(value, StoredPictures) or any(True for _ in named_in(value, key)):
            return plain.get(key, key)
    return None


def row_pictures(fields: dict[str, Any], conversation: Conversation) -> tuple[str, Sequence[Picture]]:
    """The field of the row's pictures, and the pictures. Raises RowError where two fields differ."""
    key, pictures = "", []  # type: str, Sequence[Picture]
    for name in PICTURES:
        others = pictures_of(fields.pop(name, None), name)
        if others and not pictures:
            key, pictures = name, others
        elif others:
            pictures = _same_pictures(pictures, others, key, name)
    if not pictures and (conversation.leads or (not conversation.image_refs and count_marks(conversation.messages))):
        alternative = filled_picture_field(fields, ALTERNATIVES)
        if alternative is not None:
            return alternative, pictures_of(fields.pop(alternative), alternative)
        named = [name for name in fields if name.endswith(FILE_NAMES)]
        pictures = [picture for name in named for picture in pictures_of(fields.pop(name), name)]
        key = " + ".join(named)
    return key, pictures


def _same_pictures(first: Sequence[Picture], second: Sequence[Picture], *keys: str) -> Sequence[Picture]:
    """The pictures of two fields, of which one has the data and the other the names. Raises RowError."""
    stored = isinstance(first, StoredPictures), isinstance(second, StoredPictures)
    if stored == (True, False):
        return [Picture(picture.name, number) for number, picture in enumerate(second)]
    if not any(stored):
        if first == second:
            return first
        if len(first) == len(second):
            pairs = list(zip(first, second, strict=True))
            if all((left.data is None) != (right.data is None) for left, right in pairs):
                return [left if left.data is not None else right for left, right in pairs]
    raise RowError(f"`{keys[0]}` and `{keys[1]}` have different images — leave one of them", "image")


def place_pictures(conversation: Conversation, pictures: Sequence[Picture]) -> Sequence[Picture]:
    """The pictures of a row in the order of its marks; adds the marks that the form of the row implies."""
    messages = conversation.messages
    if conversation.image_refs and any(ref is not NEXT for ref in conversation.image_refs):
        return _pictures_by_refs(conversation.image_refs, list(pictures))
    if isinstance(pictures, StoredPictures):
        # Trust the number of marks in the text: reading a picture checks it, and a text row never reads one.
        marks = count_marks(messages)
        trusted = marks == 1 or (marks > 1 and not _mark_in_each_question(messages))
        pictures = [Picture(None, number) for number in range(marks if trusted else len(pictures))]
    if conversation.needs and not pictures:
        raise RowError(f"the row has a `{conversation.form}` and no image", "image missing")
    if not pictures or not isinstance(messages, list):
        return pictures
    if conversation.leads and messages and not count_marks(messages):
        first = next(number for number, message in enumerate(messages) if message["role"] == "user")
        question = messages[first]["content"]
        messages[first] = {"role": "user", "content": f"{IMAGE_MARK}\n" * len(pictures) + question}
    elif len(pictures) == 1 and len(messages) > 2 and _mark_in_each_question(messages):
        questions = [number for number, message in enumerate(messages) if message["role"] == "user"]
        for number in questions[1:]:
            messages[number] = {**messages[number], "content": _without_mark(messages[number]["content"])}
        conversation.notes.append(MARK_PER_TURN)
    answers = [message for message in messages if isinstance(message, dict) and message.get("role") == "assistant"]
    if count_marks(answers):
        conversation.notes.append(MARK_IN_ANSWER)
    return pictures


def _mark_in_each_question(messages: Any) -> bool:
    """Whether several questions have one mark each, and no other message has any."""
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


def _pictures_by_refs(refs: list[Any], pictures: list[Picture]) -> list[Picture]:
    """The picture of each mark by its reference: its index in the row, its name or its data. Raises RowError."""
    own = {}
    for position, ref in enumerate(refs):
        if ref is not NEXT and not isinstance(ref, int):
            shown = pictures_of(ref, "content", one_name=True)
            if len(shown) != 1:
                raise RowError("an image part of a message has no image, or several", "placeholders")
            own[position] = shown[0]
    if own:
        return _beside_own(refs, own, pictures)
    indices = [ref for ref in refs if ref is not NEXT]
    for index in indices:
        if not 0 <= index < len(pictures):
            raise RowError(
                f"a part refers to image {index!s:.20}, but the row has {len(pictures)} (the first is 0)",
                "placeholders",
            )
    rest = [number for number in range(len(pictures)) if number not in indices]
    order = [rest.pop(0) if ref is NEXT and rest else ref for ref in refs]
    if rest or NEXT in order:
        referred = plural(len(set(indices)) + refs.count(NEXT), "image")
        raise RowError(f"its parts refer to {referred}, the row has {len(pictures)}", "placeholders")
    return [pictures[number] for number in order]


def _beside_own(refs: list[Any], own: dict[int, Picture], pictures: list[Picture]) -> list[Picture]:
    """The picture of each mark where items hold `own` pictures, which the row may repeat. Raises RowError."""
    if len(pictures) == len(refs):
        for position, picture in own.items():
            listed = pictures[position]
            if picture.data is None and listed.data is None and _file(picture.name) != _file(listed.name):
                break
        else:
            return [
                own[position] if position in own and listed.data is None else listed
                for position, listed in enumerate(pictures)
            ]
    others = [number for number in range(len(refs)) if number not in own]
    names = {_file(picture.name) for picture in own.values()}
    if not others and all(picture.data is None and _file(picture.name) in names for picture in pictures):
        return list(own.values())
    if len(others) != len(pictures):
        raise RowError(
            f"its parts have {plural(len(own), 'image')} of their own and refer to {len(others)} of the row, which has "
            f"{len(pictures)}",
            "placeholders",
        )
    return [own[position] if position in own else pictures.pop(0) for position in range(len(refs))]


def _file(name: str | None) -> str:
    return (name or "").replace("\\", "/").rsplit("/", 1)[-1]
