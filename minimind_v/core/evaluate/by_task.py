"""`mmv eval --task`: a model, a task and data become predictions and a report in a folder."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from minimind_v.core.config.settings import is_settings, read_settings
from minimind_v.core.data.dataset import BrokenRow
from minimind_v.core.data.feature_cache import FeatureCache
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.device import resolve_dtype
from minimind_v.core.errors import MissingInput, RowError, UsageError, nearest
from minimind_v.core.evaluate import lmms
from minimind_v.core.evaluate.answering import Features, encode_prompt
from minimind_v.core.evaluate.ask import SEEN, Messages
from minimind_v.core.evaluate.breakdown import breakdown
from minimind_v.core.evaluate.images import Images
from minimind_v.core.evaluate.measure import (
    Plan,
    Progress,
    Replies,
    all_asks,
    plan_questions,
    verdicts_of,
)
from minimind_v.core.evaluate.questions import FIELDS as READ
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.results import (
    PREDICTIONS,
    by_variant,
    checks,
    kinds_of,
    lines_of,
    main_values,
    measured,
    visual_gain,
)
from minimind_v.core.evaluate.run import features_beside
from minimind_v.core.evaluate.sheets import (
    MOST_IMAGES,
    OF_QUESTION,
    Card,
    Thumbnails,
    sheets_of,
    thumbnail,
    write_thumbnails,
)
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.evaluate.tasks.task import Task
from minimind_v.core.evaluate.template import Template
from minimind_v.core.evaluate.work import OpenModel, Work, answer_in_processes
from minimind_v.core.extensions import extensions_digest
from minimind_v.core.files import as_json, disk_errors, only_writer, read_notes, write_text
from minimind_v.core.formats.companions import tokenizer_digest
from minimind_v.core.formats.load import LoadedModel, silent
from minimind_v.core.generate.engine import CONTEXT
from minimind_v.core.hub.sources import BENCHMARKS
from minimind_v.core.outputs import check_folder
from minimind_v.core.paths import OUT_DIR
from minimind_v.core.rows.row import RowStore
from minimind_v.core.version import __version__

REPORT, REPLIES = "report.json", ".replies.jsonl"
SHOWN = 5  # skipped questions that are named
FEW_TEXTS = 4096  # questions and answers whose numbers of tokens are kept
FIELDS = "fields."  # before the keys of a task's file that name fields of the rows
USUAL = "question, answer, choices, image, hint, kind, id"  # for a message; those of the benchmarks are read, too


@dataclass(frozen=True)
class ChosenTask:
    """A task by name or from a file: one of this program, or of lmms-eval, which may name its data."""

    task: Task
    base: str  # its name in TASKS
    names: dict[str, Template]  # field that is read → what of a row it is
    data: Path | None = None
    split: str | None = None

    def source(self, data: Path | None, split: str | None) -> tuple[Path | None, str | None]:
        """The data and its split: those that are given, else the file's own. Raises MissingInput."""
        if data is None and self.data is not None and not self.data.exists():
            raise MissingInput(f"{self.task.name}: its data {self.data} is not on this machine — name it with --data")
        data = data or self.data
        own = None if data is None or data.is_file() else self.split
        return data, split or own


def choose_task(name: str) -> ChosenTask:
    """The task of this name, or of a YAML file with a `task`. Raises UsageError or MissingInput."""
    if not is_settings(name):
        return ChosenTask(_find(name, name)(name, {}), name, {})
    path = Path(name)
    if lmms.is_theirs(path):
        theirs = lmms.translate(path)
        task = TASKS[theirs.task](theirs.name, theirs.settings, theirs.until)
        return ChosenTask(task, theirs.task, theirs.names, theirs.data, theirs.split)
    settings = read_settings(path)
    if not isinstance(base := settings.pop("task", None), str):
        raise UsageError(f"{path}: no `task` — name one of {', '.join(TASKS)}")
    kind = _find(base, str(path))
    fields = {key.removeprefix(FIELDS): settings.pop(key) for key in list(settings) if key.startswith(FIELDS)}
    problems = [
        f"{FIELDS}{field} is no field that a task reads{nearest(field, READ)} — there are {USUAL}"
        for field in fields
        if field not in READ
    ]
    problems += [
        f"{FIELDS}{field} must name a field of the rows, not {value!r:.40}"
        for field, value in fields.items()
        if not isinstance(value, str) or not value
    ]
    names = {field: Template(value) for field, value in fields.items() if isinstance(value, str)}
    try:
        task = kind(path.stem, settings)
        for template in names.values():
            _ = template.fields
    except UsageError as error:
        problems.append(str(error))
    if problems:
        raise UsageError(f"{path}: {'; '.join(problems)}")
    return ChosenTask(task, base, names)


def _find(name: str, where: str) -> type[Task]:
    if name not in TASKS:
        file = "" if where == name else f"{where}: "
        if name in BENCHMARKS:
            task = BENCHMARKS[name].task
            raise UsageError(
                f"{file}{name} is a benchmark, no task — get it with `mmv download --task {name}`, and measure with "
                f"--task {task}"
            )
        raise UsageError(
            f"{file}no task {name!r}{nearest(name, TASKS)} — there are {', '.join(TASKS)}, or a file that ends in .yaml"
        )
    return TASKS[name]


@dataclass(frozen=True)
class Evaluation:
    """The report of an evaluation, what was skipped, and the questions that its page shows."""

    report: dict[str, Any]
    skipped: list[BrokenRow]
    sheets: dict[str, list[Card]]
    thumbnails: Thumbnails


@dataclass(frozen=True)
class Prepared:
    """What one or several evaluations of a model ask: the questions, and the features of their images."""

    limit: int | None
    plan: Plan
    work: Work
    images: Images
    features: Features
    vision: str  # a digest of the vision encoder's weights


def prepare(
    loaded: LoadedModel,
    chosen: ChosenTask,
    rows: RowStore,
    limit: int | None = None,
    dtype: str = "auto",
    memory: FeatureCache | None = None,
    say: Callable[[str], None] = silent,
    warn: Callable[[str], None] = silent,
) -> Prepared:
    """Read the questions and decode their images.

    `memory` has features that were encoded before; without it, those that a run has left beside the weights are read.
    `warn` gets the first questions that are skipped. The weights of the language model may change between two
    evaluations. Raises DataError where no question can be measured.
    """
    if memory is None:
        memory = features_beside(loaded.model, loaded.checkpoint.path, dtype, len(rows), say, warn)
    store = memory.store if memory else None
    images = Images(loaded.model, dtype, store)
    plan = plan_questions(rows, chosen.task, limit, _checking(loaded, chosen.task), images.decode)
    guesses = [truth for question in plan.questions for truth in question.truths]
    for skipped in plan.skipped[:SHOWN]:
        warn(f"skipped: {skipped}")
    work = Work(rows, plan.sources, guesses, dtype, store)
    return Prepared(limit, plan, work, images, work.features(images), _digest(loaded, of_vision=True))


def evaluate_task(
    loaded: LoadedModel,
    chosen: ChosenTask,
    rows: RowStore,
    out: Path | None = None,
    root: Path = OUT_DIR,
    limit: int | None = None,
    dtype: str = "auto",
    progress: Progress = lambda done, total: None,
    models: Sequence[OpenModel] = (),
    note: str = "",
    say: Callable[[str], None] = silent,
    warn: Callable[[str], None] = silent,
) -> Evaluation:
    """Measure a model: `prepare` its questions, and `measure`."""
    prepared = prepare(loaded, chosen, rows, limit, dtype, say=say, warn=warn)
    return measure(loaded, chosen, prepared, out, root, progress, models, note)


def measure(
    loaded: LoadedModel,
    chosen: ChosenTask,
    prepared: Prepared,
    out: Path | None = None,
    root: Path = OUT_DIR,
    progress: Progress = lambda done, total: None,
    models: Sequence[OpenModel] = (),
    note: str = "",
    replaces: bool = False,
) -> Evaluation:
    """Measure a model, and write `predictions.jsonl`, `report.json` and thumbnails into the folder `out`.

    Without `out` each evaluation has a folder of its own in `eval` below `root`. An evaluation that was interrupted is
    resumed. Each of `models` is opened in a process of its own, and these share the work; without any this process does
    it. `note` is what a reader of the report must know about the data. Raises UsageError for a folder with other files
    or, unless it `replaces` that, with a finished evaluation of another model, task or data; RunError where it cannot
    be written or a process was killed.
    """
    check_out(out)
    task, plan, work = chosen.task, prepared.plan, prepared.work
    rows, guesses = work.rows, work.guesses
    answer = partial(answer_in_processes, work, models) if models else work.answering(loaded, prepared.features).replies
    origin = _origin(loaded, guesses, work.dtype, prepared.vision)
    identity = measuring_digest(task, rows.path, rows.split, prepared.limit, origin)
    if out is not None and not replaces:
        _keep_finished(out, identity)
    folder = out or root / "eval" / f"{loaded.checkpoint.path.stem}-{task.name}-{identity}"
    with disk_errors(folder, "predictions"):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / PREDICTIONS):
        replies = Replies(folder / REPLIES, origin)
        try:
            verdicts = verdicts_of(all_asks(plan, task), task, answer, replies, progress)
        finally:
            replies.close()
        lines = lines_of(plan, chosen.base, verdicts)
        report = _report(loaded, rows, task, plan, lines, folder, note) | {"identity": identity}
        sheets = sheets_of(lines)
        thumbnails = _thumbnails(prepared.images, rows, plan, sheets)
        write_text(folder / PREDICTIONS, "".join(f"{as_json(line)}\n" for line in lines))
        write_text(folder / REPORT, f"{json.dumps(report, ensure_ascii=False, indent=1)}\n")
        write_thumbnails(folder, thumbnails)
        replies.remove()
    return Evaluation(report, plan.skipped, sheets, thumbnails)


def _checking(loaded: LoadedModel, task: Task) -> Callable[[Question], None]:
    """The check of a question: it raises RowError where the model cannot read it."""
    tokenizer = loaded.tokenizer
    prompts = PromptEncoder(tokenizer, loaded.model.spec.tokens_per_image)

    @lru_cache(FEW_TEXTS)
    def length(text: str) -> int:
        return len(tokenizer.encode(text))

    @lru_cache(FEW_TEXTS)
    def room(messages: Messages, images: int) -> int:
        return CONTEXT - len(encode_prompt(prompts, messages, images))

    def check(question: Question) -> None:
        for truth in question.truths:
            length(truth)
        for ask in task.asks(question):
            free, longest = room(ask.messages, len(question.images)), max(map(length, ask.candidates), default=0)
            if longest >= free:
                raise RowError(f"an answer has {longest:,} tokens, but there is room for {free - 1:,}", "too long")

    return check


def _thumbnails(images: Images, rows: RowStore, plan: Plan, sheets: dict[str, list[Card]]) -> dict[str, list[bytes]]:
    """Those of the images on the sheets, and of others, as a comparison may show them."""
    digests = {plan.cluster(question): own for question in plan.questions if (own := plan.images[question.id])}
    shown = [card.with_image["picture"] for cards in sheets.values() for card in cards]
    names = [name for name in dict.fromkeys([*shown, *sorted(digests)]) if name in digests]
    thumbnails: dict[str, list[bytes]] = {}
    for name in names[:MOST_IMAGES]:
        with suppress(RowError):
            own = digests[name][:OF_QUESTION]
            thumbnails[name] = [thumbnail(images.pixels(digest, rows, plan.sources)) for digest in own]
    return thumbnails


def _digest(loaded: LoadedModel, of_vision: bool) -> str:
    """A digest of the weights of the vision encoder, which stays the same during a run, or of all others."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(loaded.model.state_dict().items()):
        if name.startswith("vision_encoder.") == of_vision:
            checksum = crc32(tensor.detach().float().cpu().contiguous().numpy())
            digest.update(f"{name} {tuple(tensor.shape)} {checksum};".encode())
    return digest.hexdigest()


def _origin(loaded: LoadedModel, guesses: Sequence[str], dtype: str, vision: str) -> dict[str, Any]:
    """What decides the replies to given asks."""
    answers = json.dumps(sorted(Counter(guesses).items())).encode()
    return {
        "version": __version__,
        "weights": _digest(loaded, of_vision=False),
        "vision": vision,
        "tokenizer": tokenizer_digest(loaded.tokenizer),
        "layout": loaded.tokenizer.layout,
        "answers": hashlib.blake2b(answers, digest_size=8).hexdigest(),
        "precision": resolve_dtype(loaded.model.device, dtype),
        "device": str(loaded.model.device),
        "torch": torch.__version__,
        "extensions": extensions_digest(),
    }


def check_out(out: Path | None) -> None:
    """Raises UsageError for a file, or a folder with other files than those of an evaluation."""
    if out is None:
        return
    check_folder(out)
    if out.is_dir():
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if others and PREDICTIONS not in others:
            raise UsageError(f"--out {out} holds {others[0]}, and no evaluation — name another folder")


def _keep_finished(out: Path, identity: str) -> None:
    """Raises UsageError for a folder with the finished evaluation of another identity."""
    report = read_notes(out / REPORT)
    if report and report.get("identity") != identity:
        what = (
            f"{report.get('model')} by {report.get('task')} on {report.get('rows')} questions of {report.get('data')}"
        )
        raise UsageError(
            f"--out {out} holds another finished evaluation, of {what} — name another folder, or delete this one"
        )


def measuring_digest(task: Task, data: Path, split: str | None, limit: int | None, *more: Any) -> str:
    """A name by task, data, split, limit and `more`, as the origin of the replies: another of these has another one."""
    what = [*more, task.name, task.settings, str(data.resolve()), split, limit]
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=4).hexdigest()


def _report(
    loaded: LoadedModel, rows: RowStore, task: Task, plan: Plan, lines: list[dict[str, Any]], folder: Path, note: str
) -> dict[str, Any]:
    lines = sorted(lines, key=lambda line: str(line["id"]))  # so that sums do not depend on the order of the rows
    with_image = by_variant(lines)[SEEN]
    kinds = kinds_of(lines)
    return {
        "model": str(loaded.checkpoint.path),
        "data": str(rows.path),
        **({"split": rows.split} if rows.split else {}),
        **({"note": note} if note else {}),
        "task": task.name,
        "rows": len(plan.questions),
        "pictures": plan.pictures,
        "skipped": len(plan.skipped),
        "visual_gain": visual_gain(lines),
        "variants": main_values(lines),
        "metrics": [result.report() for result in measured(with_image)],
        **({"kinds": kinds} if kinds else {}),
        "bootstrap": checks(with_image),
        **breakdown(with_image),
        "skipped_reasons": dict(Counter(skipped.kind for skipped in plan.skipped)),
        "predictions": str(folder / PREDICTIONS),
    }
