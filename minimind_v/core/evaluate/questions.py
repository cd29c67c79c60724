"""Questions: the one form to which the rows of all benchmarks are read.

A row is a conversation, whose every turn is a question, or a record of fields as COCO, VQAv2, GQA, OK-VQA, TextVQA,
POPE, MMStar, MMBench, SEED-Bench, MME, ScienceQA and LLaVA-Bench name them. A task refuses a question that lacks what
it needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.evaluate.normalise import HAN
from minimind_v.core.rows.cells import StoredPictures
from minimind_v.core.rows.field_names import ALTERNATIVES, CAPTIONS, FILE_NAMES, PICTURES, TALKS, plain_names
from minimind_v.core.rows.forms import DESCRIBE, DESCRIBE_CHINESE, read_row
from minimind_v.core.rows.row import IMAGE_MARK, Row

QUESTIONS = ("question", "query", "prompt")
ANSWERS = ("answers", "answer", "multiple_choice_answer", "label", "response", "gpt_answer", "gpt4_answer")
CHOICES = ("choices", "options", "candidates", "multiple_choices")
KINDS = (
    *("kind", "category", "answer_type", "question_type", "type", "types", "l2_category", "data_type", "subject"),
    *("topic", "skill"),
)
IDS = ("question_id", "id", "index", "pid")
IMAGE_IDS = ("image_id", "imageId", "data_id")  # a picture file's name without its beginning and ending
CONTEXTS = ("hint",)  # a text before the question
LETTERS = "ABCDEFGHIJ"
NOTHING = ("", "nan")  # how tables write an empty cell
IN_TEXT = re.compile(r"(?:^|[\s,;(])\(?([A-J])[.:)]\s*(.+?)(?=[\s,;]*\(?[A-J][.:)]\s|\s*$)", re.DOTALL)
OPTIONS = re.compile(r"\n\s*(?:Options|Choices|选项)\s*[:：]", re.IGNORECASE)
DESCRIBED = "the description that stands for a question"


@dataclass(frozen=True)
class Question:
    """A question about images, with the true answers."""

    id: str
    index: int  # of its row in the store
    location: str  # file:row
    messages: tuple[tuple[str, str], ...]  # role and content; the last is the question, an `<image>` mark per image
    images: tuple[str, ...]  # the names of the row's images, of which the marks show these
    truths: tuple[str, ...]  # what annotators answered, or the references
    choices: tuple[str, ...] = ()
    correct: int | None = None  # the number of the right choice
    kind: str = ""
    written: str = ""  # the fields of its row, for messages

    @property
    def text(self) -> str:
        """The question without image marks."""
        return self.messages[-1][1].replace(f"{IMAGE_MARK}\n", "").replace(IMAGE_MARK, "").strip()

    @property
    def chinese(self) -> bool:
        """Whether its answer is Chinese."""
        return HAN.search(" ".join(self.truths) or self.text) is not None

    def needs(self, what: str, fields: str) -> RowError:
        """The error for a question that lacks something."""
        return RowError(f"no {what} ({fields}) in {self.written or 'the row'}", "missing field")


def question_reader(names: Mapping[str, str]) -> Callable[[Mapping[str, Any]], Row]:
    """How a store reads rows for an evaluation; `names` gives fields of the file under the names that are read here.

    The fields stay in `Row.extra`, without the bytes of pictures.
    """
    return partial(_read_question, dict(names))


def _read_question(names: Mapping[str, str], fields: Mapping[str, Any]) -> Row:
    fields = dict(fields) | {name: fields[own] for name, own in names.items() if own in fields}
    notes = {key: value for key, value in fields.items() if not isinstance(value, StoredPictures | bytes)}
    if any(fields.get(key) for key in (*TALKS, "texts")):
        return replace(read_row(fields), extra=notes)
    row = read_row({"question": _question_text(fields), "answer": "-", **_pictures(fields)})
    return replace(row, extra=notes | {DESCRIBED: _stands_for_question(fields)})


def questions_of(row: Row, index: int, number: int, location: str) -> list[Question]:
    """The questions of a row: one, or one for each turn of a conversation. Raises RowError."""
    fields = row.extra
    if not isinstance(row.conversations, list):
        raise RowError(f"no question in {', '.join(map(str, fields)) or 'an empty row'}", "missing field")
    name = next((_text(fields[key]) for key in IDS if _filled(fields.get(key))), str(number))
    kind, written = _kind(fields), ", ".join(f"`{key}`" for key in fields if key != DESCRIBED)
    messages = tuple((message["role"], message["content"]) for message in row.conversations)
    if DESCRIBED not in fields:
        return [
            replace(question, kind=kind, written=written)
            for question in _turns(messages, tuple(row.shown), name, index, location)
        ]
    choices = _choices(fields)
    truths, correct = _truths(fields, choices)
    messages = (*messages[:-2], ("user", messages[-2][1])) if len(messages) > 1 else messages
    question = Question(name, index, location, messages, tuple(row.shown), truths, choices, correct, kind, written)
    if fields[DESCRIBED] and question.chinese:
        content = messages[-1][1].replace(DESCRIBE, DESCRIBE_CHINESE)
        question = replace(question, messages=(*messages[:-1], ("user", content)))
    return [question]


def _turns(
    messages: tuple[tuple[str, str], ...], images: tuple[str, ...], name: str, index: int, location: str
) -> Iterator[Question]:
    ends = [end for end, (role, _) in enumerate(messages) if role == "assistant" and end]
    for turn, end in enumerate(ends):
        before = messages[:end]
        count = sum(content.count(IMAGE_MARK) for role, content in before if role != "assistant")
        own = f"{name}.{turn + 1}" if len(ends) > 1 else name
        truth = messages[end][1]
        yield Question(own, index, location, before, images[:count], (truth,) if isinstance(truth, str) else ())


def _question_text(fields: Mapping[str, Any]) -> str:
    text = next((_text(fields[key]) for key in QUESTIONS if _filled(fields.get(key))), "")
    if not text and _filled(fields.get("text")) and not _stands_for_question(fields):
        text = _text(fields["text"])
    if not text:
        return DESCRIBE
    contexts = [_text(fields[key]).strip() for key in CONTEXTS if _filled(fields.get(key))]
    return "\n".join([*contexts, text])


def _stands_for_question(fields: Mapping[str, Any]) -> bool:
    """Whether the row has captions and no question; POPE and LLaVA-Bench call the question `text`."""
    if any(_filled(fields.get(key)) for key in QUESTIONS):
        return False
    return not (_filled(fields.get("text")) and ("label" in fields or "question_id" in fields))


def _pictures(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of pictures; an image's id where no field holds or names pictures."""
    plain = plain_names(fields)
    pictures = {
        plain.get(key, key): fields[plain.get(key, key)]
        for key in (*PICTURES, *ALTERNATIVES)
        if fields.get(plain.get(key, key)) is not None and not isinstance(fields[plain.get(key, key)], int)
    }
    pictures |= {key: value for key, value in fields.items() if key.endswith(FILE_NAMES) and value is not None}
    if not pictures:
        identity = next((fields[key] for key in IMAGE_IDS if _filled(fields.get(key))), None)
        pictures = {} if identity is None else {"image": [_text(identity)]}
    return pictures


def _choices(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = next((fields[key] for key in CHOICES if _filled(fields.get(key))), None)
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list | tuple):
        return tuple(_text(choice) for choice in value if _filled(choice))
    for key in (lambda letter: letter, lambda letter: f"choice_{letter.lower()}", lambda letter: f"option_{letter}"):
        columns = [fields.get(key(letter)) for letter in LETTERS]
        count = next((number for number, cell in enumerate(columns) if not _filled(cell)), len(columns))
        if count > 1:
            return tuple(map(_text, columns[:count]))
    text = _question_text(fields)
    match = OPTIONS.search(text)
    inline = IN_TEXT.findall(text[match.end() :]) if match else []
    if len(inline) > 1 and [letter for letter, _ in inline] == list(LETTERS[: len(inline)]):
        return tuple(choice.strip().rstrip(",;") for _, choice in inline)
    return ()


def _truths(fields: Mapping[str, Any], choices: tuple[str, ...]) -> tuple[tuple[str, ...], int | None]:
    """The true answers, and the number of the right choice."""
    keys = [*ANSWERS, *CAPTIONS]
    if choices:  # the one answer is the choice
        keys = ["answer", *keys]
    key = next((key for key in keys if _filled(fields.get(key))), None)
    if key is None or (key == "text" and not _stands_for_question(fields)):
        return (), None
    value = fields[key]
    values = value if isinstance(value, list | tuple) else [value]
    truths = tuple(_text(_answer(answer)) for answer in values if _filled(_answer(answer)))
    if not choices or not truths:
        return truths, None
    correct = _number_of(_answer(values[0]), choices)
    return ((choices[correct],) if correct is not None else truths), correct


def _number_of(answer: Any, choices: tuple[str, ...]) -> int | None:
    """The number of a choice given by its text, its letter or, as a whole number, its number from 0."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    text = _text(answer).strip()
    if text in choices:
        return choices.index(text)
    letter = text.strip("().: ").upper()
    if len(letter) == 1 and letter in LETTERS[: len(choices)]:
        return LETTERS.index(letter)
    return next((number for number in range(len(choices)) if text == str(number)), None)


def _answer(value: Any) -> Any:
    """An annotator's answer, which VQA writes as a record."""
    if isinstance(value, Mapping):
        return next((value[name] for name in ("answer", "caption", "raw", "text") if name in value), None)
    return value


def _kind(fields: Mapping[str, Any]) -> str:
    for key in KINDS:
        value = fields.get(key, fields.get(key.replace("_", "-")))
        if isinstance(value, Mapping):  # GQA
            value = value.get("structural") or next(iter(value.values()), None)
        if _filled(value) and isinstance(value, str | int):
            return _text(value)
    return ""


def _filled(value: Any) -> bool:
    if isinstance(value, float):
        return value == value  # a table's empty number is not a number
    return value is not None and value != [] and not (isinstance(value, str) and value.strip().lower() in NOTHING)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
