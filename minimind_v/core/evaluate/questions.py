"""Questions: the one form to which the rows of all benchmarks are read.

A row is a conversation, whose every turn is a question, or a record of fields as COCO, VQAv2, GQA, OK-VQA, TextVQA,
POPE, MMStar, MMBench, SEED-Bench, MME, ScienceQA and LLaVA-Bench name them. A task refuses a question that lacks what
it needs.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from minimind_v.core.errors import RowError
from minimind_v.core.evaluate.normalise import HAN
from minimind_v.core.evaluate.template import Template
from minimind_v.core.rows.cells import StoredPictures, records_of
from minimind_v.core.rows.field_names import ALTERNATIVES, CAPTIONS, FILE_NAMES, PICTURES, TALKS, plain_names
from minimind_v.core.rows.forms import DESCRIBE, DESCRIBE_CHINESE, read_row
from minimind_v.core.rows.row import IMAGE_MARK, Row

QUESTIONS = ("question", "query", "prompt")
ANSWERS = ("answers", "answer", "multiple_choice_answer", "label", "response", "gpt_answer", "gpt4_answer")
ANSWER_NUMBERS = ("answer_index", "correct_choice_idx")  # the number of the right choice, from 0
NUMBERING = ("lecture", "skill", "pid")  # fields of ScienceQA, which always numbers its choices
CHOICES = ("choices", "options", "candidates", "multiple_choices")
KINDS = (
    *("kind", "category", "answer_type", "question_type", "type", "types", "l2_category", "data_type", "subject"),
    *("topic", "skill"),
)
IDS = ("question_id", "id", "index", "pid")
IMAGE_IDS = ("image_id", "imageId", "data_id")  # a picture file's name without its beginning and ending
CONTEXTS = ("hint",)  # a text before the question
LETTERS = "ABCDEFGHIJ"
LETTERED = ("{}", "choice_{}", "option_{}")  # columns of choices, with a letter of either case
# What a task's file may give under `fields`.
FIELDS = (
    *(*QUESTIONS, *ANSWERS, *CHOICES, *ANSWER_NUMBERS, *KINDS, *IDS, *CONTEXTS, *IMAGE_IDS, *PICTURES, *ALTERNATIVES),
    *(*CAPTIONS, *LETTERS),
)
# Names of one thing: where a task's file gives one of them, the row's others do not count.
GROUPS = (QUESTIONS, (*ANSWERS, *ANSWER_NUMBERS), (*CHOICES, *LETTERS), KINDS, IDS, (*PICTURES, *ALTERNATIVES))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
FEW_DIGITS = re.compile(r"[0-9]{1,4}")  # of a choice's number
PLURAL = ("answers", "captions")  # may be a list that is written as text; the one answer `[0, 1]` is a text
LONGEST_LIST = 1 << 16  # characters of a list that is written as text
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


class QuestionReader:
    """How a store reads rows for an evaluation; `names` gives values of the row under the names that are read here.

    The fields stay in `Row.extra`, without the bytes of pictures.
    """

    def __init__(self, names: Mapping[str, Template]) -> None:
        self._names = names
        self.absent = {own: name for name, template in names.items() for own in template.fields}  # in no row so far
        self.present: set[str] = set()

    def __call__(self, fields: Mapping[str, Any]) -> Row:
        if self.absent:
            self.present |= set(fields)
            self.absent = {own: name for own, name in self.absent.items() if own not in fields}
        filled = {name: template.fill(fields) for name, template in self._names.items()}
        others = {key for group in GROUPS if not filled.keys().isdisjoint(group) for key in group}
        fields = {key: value for key, value in fields.items() if key not in others}
        fields |= {name: value for name, value in filled.items() if value is not None}
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
    choices, keys = _choices(fields)
    truths, correct = _truths(fields, choices, keys)
    if correct is not None:
        correct -= choices[:correct].count("")
    choices = tuple(filter(None, choices))  # an empty one is no choice to make
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


def _choices(fields: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices, and their keys where the row has some.

    An absent one has no text and keeps its place, so that a letter or a number means the same choice; behind the last
    one there is none.
    """
    value = _listed(next((fields[key] for key in CHOICES if _filled(fields.get(key))), None))
    if isinstance(value, Mapping):
        value, keys = _keyed(value)
        return _texts(value), keys
    if isinstance(value, list | tuple):
        return _texts(value), ()
    for form in LETTERED:
        names = [
            next((name for name in (form.format(letter), form.format(letter.lower())) if name in fields), None)
            for letter in LETTERS
        ]
        count = names.index(None) if None in names else len(names)
        columns = [fields[name] for name in names[:count] if name is not None]
        choices = _texts([cell if _filled(cell) else None for cell in columns])
        if len(choices) - choices.count("") > 1:
            return choices, ()
    text = _question_text(fields)
    match = OPTIONS.search(text)
    inline = IN_TEXT.findall(text[match.end() :]) if match else []
    if len(inline) > 1 and [letter for letter, _ in inline] == list(LETTERS[: len(inline)]):
        return tuple(choice.strip().rstrip(",;") for _, choice in inline), ()
    return (), ()


def _keyed(value: Mapping[Any, Any]) -> tuple[list[Any], tuple[str, ...]]:
    """The choices of a mapping by key, and their keys in order, numbers as numbers; or its lists `text` and `label`."""
    if isinstance(texts := value.get("text"), list):
        labels = value.get("label")
        labels = labels if isinstance(labels, list) and len(labels) == len(texts) else []
        return texts, tuple(map(_text, labels))
    by_key = {_text(key): choice for key, choice in value.items()}
    keys = sorted(by_key)
    if all(map(NUMBER.fullmatch, keys)):
        keys.sort(key=float)
    return [by_key[key] for key in keys], tuple(keys)


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    """The texts of choices, empty for an absent one; those at the end are left out."""
    texts = ["" if _is_absent(value) else _text(value) for value in values]
    while texts and not texts[-1]:
        del texts[-1]
    return tuple(texts)


def _listed(value: Any) -> Any:
    """A list or a mapping that a table holds as text, in JSON or as Python writes it; any other value as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{") or len(value) > LONGEST_LIST:
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            parsed = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return parsed if isinstance(parsed, list | dict) else value
    return value


def _truths(
    fields: Mapping[str, Any], choices: tuple[str, ...], keys: tuple[str, ...]
) -> tuple[tuple[str, ...], int | None]:
    """The true answers, and the number of the right choice; None where several are right."""
    numbers = (_whole(fields.get(name), is_text=True) for name in ANSWER_NUMBERS)
    number = next((number for number in numbers if number in range(len(choices))), None)
    if number is not None:
        return ((choices[number],), number) if choices[number] else ((), None)
    names = [*ANSWERS, *CAPTIONS]
    if choices:  # the one answer is the choice
        names = ["answer", "multiple_choice_answer", *names]
    name = next((name for name in names if _filled(fields.get(name))), None)
    if name is None or (name == "text" and not _stands_for_question(fields)):
        return (), None
    value = _listed(fields[name]) if name in PLURAL else fields[name]
    if isinstance(value, dict) and any(isinstance(column, list) for column in value.values()):
        value = records_of(value)
    answers = [_answer(answer) for answer in (value if isinstance(value, list | tuple) else [value])]
    truths = tuple(_text(answer) for answer in answers if not _is_absent(answer))
    is_numbered = any(name in fields for name in NUMBERING)
    right = {_number_of(answer, choices, keys, is_numbered) for answer in answers if not _is_absent(answer)}
    correct = right.pop() if choices and len(right) == 1 else None
    return (truths, None) if correct is None else ((choices[correct],), correct)


def _number_of(answer: Any, choices: tuple[str, ...], keys: tuple[str, ...], is_numbered: bool) -> int | None:
    """The number of a choice given by its key, its text, its letter or, as a whole number, its number from 0.

    Where all choices are numbers, a whole number that is one of them is that choice, unless the benchmark numbers its
    choices: `3` among 2, 3, 4 is the second. Keys that are letters or numbers stand for all of their sort.
    """
    text = _text(answer).strip()
    letter = text.strip("().: ").upper()
    if name := next((name for name in (text, letter, letter.lower()) if name in keys), None):
        return _real(keys.index(name), choices)
    whole = _whole(answer)
    is_value = not is_numbered and all(map(NUMBER.fullmatch, filter(None, choices)))
    if text and text in choices and (whole is None or is_value):
        return choices.index(text)
    if whole is None and len(letter) == 1 and letter in LETTERS:
        return None if keys and set(keys) <= {*LETTERS, *LETTERS.lower()} else _real(LETTERS.index(letter), choices)
    return None if keys and all(map(NUMBER.fullmatch, keys)) else _real(_whole(answer, is_text=True), choices)


def _whole(value: Any, is_text: bool = False) -> int | None:
    """A whole number, which a table may hold as a float or, with `is_text`, a text; None for any other value."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if is_text and isinstance(value, str) and FEW_DIGITS.fullmatch(value.strip()):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _real(number: int | None, choices: tuple[str, ...]) -> int | None:
    """The number of a choice; None where there is none of this number, or one without a text."""
    return number if number is not None and 0 <= number < len(choices) and choices[number] else None


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
    """Whether a cell has a value; a table may write an empty one as a text."""
    return not _is_absent(value) and value != [] and not (isinstance(value, str) and value.strip().lower() == "nan")


def _is_absent(value: Any) -> bool:
    """Whether an entry of a list is empty: a table's empty number is not a number."""
    return (
        value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip())
    )


def _text(value: Any) -> str:
    """A value as text, a number with all its digits; a table makes floats of whole numbers."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
