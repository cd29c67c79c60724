"""Measure a model by a task: every question with its image, a blank one, that of another row, and without any.

The asks of all questions and variants are sorted by their image, so that each image is encoded once, and cut into
groups, the unit that is computed and saved. Which asks share a group depends on all of them together: so a digit
depends on neither the order of the rows nor on an interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from minimind_v.core.data.dataset import BrokenRow
from minimind_v.core.data.feature_store import digest
from minimind_v.core.errors import DataError, RowError, RunError
from minimind_v.core.evaluate.ask import BLANK, NONE, SEEN, SWAPPED, VARIANTS, Ask, Reply
from minimind_v.core.evaluate.benchmarks import read_picture
from minimind_v.core.evaluate.questions import Question, questions_of
from minimind_v.core.evaluate.tasks.task import Task, Verdict
from minimind_v.core.files import write_text
from minimind_v.core.rows.row import NUMBERED, RowStore

GROUP = 64  # asks that are computed and saved together
BLANK_IMAGE = "blank"  # instead of a digest
SEED = 0  # of the questions that --limit takes

Progress = Callable[[int, int], None]  # asks that are answered, and all
Source = tuple[int, int, str]  # of an image: its row, its position there and its name
Answer = Callable[[Sequence[Sequence[Ask]]], Iterator[list[Reply]]]  # groups → the replies to each, in their order
Decode = Callable[[str, bytes, str], None]  # digest, bytes and name of a picture; raises RowError


@dataclass
class Plan:
    """The questions that are measured, and their images."""

    questions: list[Question] = field(default_factory=list)
    available: int = 0  # questions of the task in all rows
    skipped: list[BrokenRow] = field(default_factory=list)
    images: dict[str, tuple[str, ...]] = field(default_factory=dict)  # question → digests of its images
    sources: dict[str, Source] = field(default_factory=dict)  # by digest
    names: dict[str, str] = field(default_factory=dict)  # digest → the name of the image

    def cluster(self, question: Question) -> str:
        """What a question shares with others that are not independent of it: its images, or itself without any."""
        clusters = [self._clusters[digest] for digest in self.images[question.id]]
        return "+".join(clusters) or f"question {question.id}"

    @cached_property
    def _clusters(self) -> dict[str, str]:
        """The name of each image; with its digest where several have one name, as in ScienceQA. Of a complete plan."""
        counts = Counter(self.names.values())
        return {digest: name if counts[name] == 1 else f"{name} {digest[:8]}" for digest, name in self.names.items()}

    @property
    def pictures(self) -> int:
        """The number of different images."""
        return len(self.sources)


def plan_questions(
    rows: RowStore, task: Task, limit: int | None, check: Callable[[Question], None], decode: Decode
) -> Plan:
    """Read all rows, take `limit` of the task's questions, and find their images.

    `check` raises RowError for a question that the model cannot read, `decode` for an image. Raises DataError where
    nothing is left.
    """
    plan = Plan()
    questions = list(_read_questions(rows, task, plan))
    plan.available = len(questions)
    for question in _stratified(questions, limit):
        try:
            check(question)
            _find_images(rows, question, plan, decode)
            plan.questions.append(question)
        except RowError as error:
            plan.skipped.append(BrokenRow(question.location, error.kind, str(error)))
    if not plan.questions:
        first = f"; the first problem: {plan.skipped[0]}" if plan.skipped else ""
        raise DataError(f"{rows.path}: no question for the task {task.name}{first}")
    return plan


def _read_questions(rows: RowStore, task: Task, plan: Plan) -> Iterator[Question]:
    questions: list[Question] = []
    for index in range(len(rows)):
        location = rows.location(index)
        try:
            questions += questions_of(rows.row(index), index, rows.number(index), location)
        except RowError as error:
            plan.skipped.append(BrokenRow(location, error.kind, str(error)))
    selected = task.select(questions)
    names = {question.id for question in selected}
    taken: Counter[str] = Counter()
    for question in selected:
        try:
            task.check(question)
        except RowError as error:
            plan.skipped.append(BrokenRow(question.location, error.kind, str(error)))
            continue
        taken[question.id] += 1
        if taken[question.id] > 1:
            while (name := f"{question.id}#{taken[question.id]}") in names:
                taken[question.id] += 1
            names.add(name)
            question = replace(question, id=name)
        yield question


def _stratified(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """So many questions, of each kind a share as in all, drawn by a fixed seed; in the order of the rows."""
    if limit is None or limit >= len(questions):
        return list(questions)
    kinds: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        kinds[question.kind].append(question)
    shares = {kind: len(own) * limit / len(questions) for kind, own in kinds.items()}
    counts = {kind: int(share) for kind, share in shares.items()}
    by_rest = sorted(kinds, key=lambda kind: (counts[kind] - shares[kind], kind))
    for kind in by_rest[: limit - sum(counts.values())]:
        counts[kind] += 1
    drawn = {
        question.id
        for kind, own in kinds.items()
        for question in sorted(own, key=lambda own_question: _draw(own_question.id))[: counts[kind]]
    }
    return [question for question in questions if question.id in drawn]


def _draw(name: str) -> str:
    return hashlib.blake2b(f"{SEED} {name}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _find_images(rows: RowStore, question: Question, plan: Plan, decode: Decode) -> None:
    """Note the digests of a question's images. Raises RowError where one cannot be read."""
    digests: list[str] = []
    sources: dict[str, Source] = {}
    row = rows.row(question.index) if question.images else None
    for position, name in enumerate(question.images):
        assert row is not None
        data = read_picture(rows, row, question.index, position, name)
        key = digest(data).hex()
        digests.append(key)
        if key not in plan.sources:
            decode(key, data, name)
            sources[key] = question.index, position, name
    plan.images[question.id] = tuple(digests)
    plan.sources |= sources
    for key, name in zip(digests, question.images, strict=True):
        shown = key if NUMBERED.fullmatch(name) else name
        plan.names[key] = min(plan.names.get(key, shown), shown)


def variants_of(question: Question, plan: Plan, others: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The images of a question by variant; `others` has the image of another row for each.

    No image replaces one of its own question; where there is no other, nothing is swapped.
    """
    own = plan.images[question.id]
    if not own:
        return {SEEN: ()}
    swapped = {SWAPPED: tuple(_other(image, own, others) for image in own)} if set(own) != set(others) else {}
    return {SEEN: own, BLANK: (BLANK_IMAGE,) * len(own), **swapped, NONE: ()}


def _other(image: str, own: Sequence[str], others: Mapping[str, str]) -> str:
    while image in own:
        image = others[image]
    return image


def other_images(plan: Plan) -> dict[str, str]:
    """Another image for each: the next one in an order that the content of the images decides."""
    order = sorted(plan.sources, key=_draw)
    return dict(zip(order, [*order[1:], *order[:1]], strict=True))


@dataclass(frozen=True)
class Asked:
    """A question in one variant, and what is asked."""

    question: Question
    variant: str
    asks: tuple[Ask, ...]


def all_asks(plan: Plan, task: Task) -> list[Asked]:
    """What is asked about each question in each variant, in the order of the questions."""
    others = other_images(plan)
    asked = []
    for question in plan.questions:
        plain = task.asks(question)
        for variant, images in variants_of(question, plan, others).items():
            asked.append(Asked(question, variant, tuple(ask.showing(images) for ask in plain)))
    return asked


def groups_of(asked: Sequence[Asked]) -> list[list[Ask]]:
    """All different asks in groups; those of an image are together, and begin a new group rather than be divided."""
    asks = {ask.key: ask for entry in asked for ask in entry.asks}
    ordered = sorted(asks.items(), key=lambda item: ([_draw(image) for image in item[1].images], item[0]))
    groups: list[list[Ask]] = []
    for _, items in groupby(ordered, key=lambda item: item[1].images):
        own = [ask for _, ask in items]
        for piece in (own[begin : begin + GROUP] for begin in range(0, len(own), GROUP)):
            if groups and len(groups[-1]) + len(piece) <= GROUP:
                groups[-1] += piece
            else:
                groups.append(piece)
    return groups


class Replies:
    """The replies to asks in a file, a line for each group: whole lines are read again after an interruption."""

    def __init__(self, path: Path, origin: Mapping[str, Any]) -> None:
        """`origin` decides the digits; the replies of another one are not used."""
        self.path, self._groups = path, dict[str, list[Reply]]()
        head = f"{json.dumps({'origin': dict(origin)})}\n".encode()
        with suppress(OSError):
            head = self._read(path.read_bytes(), head)
        if not self._groups:
            write_text(path, head.decode())
        self._file = path.open("r+b")
        self._file.truncate(len(head))
        self._file.seek(len(head))

    def _read(self, data: bytes, head: bytes) -> bytes:
        """Take the replies behind `head` up to the first line that is cut or damaged; returns what is before it."""
        if not data.startswith(head):
            return head
        whole = head
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            for own in data[len(head) :].splitlines(keepends=True):
                line = json.loads(own)
                replies = [
                    Reply(str(text), tuple(logprobs), tuple(tokens)) for text, logprobs, tokens in line["replies"]
                ]
                if not own.endswith(b"\n") or not isinstance(line["group"], str):
                    break
                self._groups[line["group"]] = replies
                whole += own
        return whole

    def of(self, groups: Sequence[Sequence[Ask]], answer: Answer) -> Iterator[list[Reply]]:
        """The replies to groups in their order; `answer` computes those that are not in the file, and each is saved."""
        names = [
            hashlib.blake2b("".join(ask.key for ask in group).encode(), digest_size=8).hexdigest() for group in groups
        ]
        for name, group in zip(names, groups, strict=True):
            if len(self._groups.get(name, group)) != len(group):  # damaged
                del self._groups[name]
        computed = answer([group for name, group in zip(names, groups, strict=True) if name not in self._groups])
        for name in names:
            if name not in self._groups:
                self._groups[name] = next(computed)
                line = f"{json.dumps({'group': name, 'replies': _plain(self._groups[name])})}\n"
                try:
                    self._file.write(line.encode())
                    self._file.flush()
                except OSError as error:
                    raise RunError(
                        f"{self.path}: a reply cannot be saved there ({error.strerror}) — free space and start again: "
                        "the saved ones are kept"
                    ) from error
            yield self._groups[name]

    def close(self) -> None:
        """Close the file; it stays until `remove`."""
        with suppress(OSError):  # what could not be written
            self._file.close()

    def remove(self) -> None:
        """Remove the file: its replies are in the predictions."""
        self.close()
        with suppress(OSError):
            self.path.unlink()


def _plain(replies: Sequence[Reply]) -> list[list[Any]]:
    return [[reply.text, reply.logprobs, reply.tokens] for reply in replies]


def verdicts_of(
    asked: Sequence[Asked], task: Task, answer: Answer, replies: Replies, progress: Progress
) -> dict[str, list[tuple[Question, Verdict]]]:
    """The verdicts by variant, in the order of the questions."""
    groups = groups_of(asked)
    total = sum(map(len, groups))
    by_key: dict[str, Reply] = {}
    for group, own in zip(groups, replies.of(groups, answer), strict=True):
        by_key |= zip([ask.key for ask in group], own, strict=True)
        progress(len(by_key), total)
    judged: dict[str, list[tuple[Question, Verdict]]] = {variant: [] for variant in VARIANTS}
    for entry in asked:
        verdict = task.judge(entry.question, [by_key[ask.key] for ask in entry.asks])
        judged[entry.variant].append((entry.question, verdict))
    return {
        variant: list(zip(*_completed(task, entries), strict=True)) for variant, entries in judged.items() if entries
    }


def _completed(task: Task, entries: Sequence[tuple[Question, Verdict]]) -> tuple[list[Question], list[Verdict]]:
    questions, verdicts = [question for question, _ in entries], [verdict for _, verdict in entries]
    return questions, task.complete(questions, verdicts)
