"""`mmv eval --task`: a model, a task and data become predictions and a report in a folder."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from minimind_v.core.config.settings import read_settings
from minimind_v.core.data.dataset import BrokenRow
from minimind_v.core.data.feature_cache import FeatureCache
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.device import resolve_dtype
from minimind_v.core.errors import RowError, UsageError, nearest
from minimind_v.core.evaluate.answering import encode_prompt
from minimind_v.core.evaluate.ask import SEEN, Messages
from minimind_v.core.evaluate.images import Images
from minimind_v.core.evaluate.measure import (
    Plan,
    Progress,
    Replies,
    all_asks,
    plan_questions,
    verdicts_of,
)
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.results import PREDICTIONS, by_variant, checks, kinds_of, lines_of, measured, visual_gain
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.evaluate.tasks.task import Task
from minimind_v.core.evaluate.work import OpenModel, Work, answer_in_processes
from minimind_v.core.extensions import extensions_digest
from minimind_v.core.files import as_json, disk_errors, only_writer, write_text
from minimind_v.core.formats.companions import tokenizer_digest
from minimind_v.core.formats.load import LoadedModel
from minimind_v.core.generate.engine import CONTEXT
from minimind_v.core.paths import OUT_DIR
from minimind_v.core.rows.row import RowStore
from minimind_v.core.version import __version__

REPORT, REPLIES = "report.json", ".replies.jsonl"
FEW_TEXTS = 4096  # questions and answers whose numbers of tokens are kept
FIELDS = "fields."  # before the keys of a task's file that name fields of the rows


@dataclass(frozen=True)
class ChosenTask:
    """A task by name or from a user's file."""

    task: Task
    base: str  # its name in TASKS
    names: dict[str, str]  # field that is read → field of the rows


def choose_task(name: str) -> ChosenTask:
    """The task of this name, or of a YAML file with a `task`. Raises UsageError or MissingInput."""
    if not name.endswith((".yaml", ".yml")):
        return ChosenTask(_find(name, name)(name, {}), name, {})
    path = Path(name)
    settings = read_settings(path)
    if not isinstance(base := settings.pop("task", None), str):
        raise UsageError(f"{path}: no `task` — name one of {', '.join(TASKS)}")
    names = {key.removeprefix(FIELDS): settings.pop(key) for key in list(settings) if key.startswith(FIELDS)}
    if wrong := [key for key, value in names.items() if not isinstance(value, str)]:
        raise UsageError(f"{path}: {FIELDS}{wrong[0]} must name a field of the rows")
    return ChosenTask(_find(base, str(path))(path.stem, settings), base, names)


def _find(name: str, where: str) -> type[Task]:
    if name not in TASKS:
        file = "" if where == name else f"{where}: "
        raise UsageError(
            f"{file}no task {name!r}{nearest(name, TASKS)} — there are {', '.join(TASKS)}, or a file that ends in .yaml"
        )
    return TASKS[name]


@dataclass(frozen=True)
class Evaluation:
    """The report of an evaluation, and what was skipped."""

    report: dict[str, Any]
    skipped: list[BrokenRow]


def evaluate_task(
    loaded: LoadedModel,
    chosen: ChosenTask,
    rows: RowStore,
    out: Path | None = None,
    root: Path = OUT_DIR,
    limit: int | None = None,
    dtype: str = "auto",
    memory: FeatureCache | None = None,
    progress: Progress = lambda done, total: None,
    models: Sequence[OpenModel] = (),
) -> Evaluation:
    """Measure a model, and write `predictions.jsonl` and `report.json` into the folder `out`.

    Without `out` each evaluation has a folder of its own in `eval` below `root`. `memory` has features that were
    encoded before. An evaluation that was interrupted is resumed. Each of `models` is opened in a process of its own,
    and these share the work; without any this process does it. Raises DataError where no question can be measured,
    UsageError for a folder with other files, RunError where it cannot be written or a process was killed.
    """
    if out is not None:
        _keep_others(out)
    task, store = chosen.task, memory.store if memory else None
    images = Images(loaded.model, dtype, store)
    plan = plan_questions(rows, task, limit, _checking(loaded, task), images.decode)
    guesses = [truth for question in plan.questions for truth in question.truths]
    work = Work(rows, plan.sources, guesses, dtype, store)
    answer = partial(answer_in_processes, work, models) if models else work.answering(loaded, images).replies
    origin = _origin(loaded, guesses, dtype)
    folder = out or _folder(root, loaded, task, rows, origin, limit)
    with disk_errors(folder, "predictions"):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / PREDICTIONS):
        replies = Replies(folder / REPLIES, origin)
        try:
            verdicts = verdicts_of(all_asks(plan, task), task, answer, replies, progress)
        finally:
            replies.close()
        lines = lines_of(plan, chosen.base, verdicts)
        report = _report(loaded, rows, task, plan, lines, folder)
        write_text(folder / PREDICTIONS, "".join(f"{as_json(line)}\n" for line in lines))
        write_text(folder / REPORT, f"{json.dumps(report, ensure_ascii=False, indent=1)}\n")
        replies.remove()
    return Evaluation(report, plan.skipped)


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


def _origin(loaded: LoadedModel, guesses: list[str], dtype: str) -> dict[str, Any]:
    """What decides the replies to given asks."""
    weights = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(loaded.model.state_dict().items()):
        checksum = crc32(tensor.detach().float().cpu().contiguous().numpy())
        weights.update(f"{name} {tuple(tensor.shape)} {checksum};".encode())
    answers = json.dumps(sorted(Counter(guesses).items())).encode()
    return {
        "version": __version__,
        "weights": weights.hexdigest(),
        "tokenizer": tokenizer_digest(loaded.tokenizer),
        "layout": loaded.tokenizer.layout,
        "answers": hashlib.blake2b(answers, digest_size=8).hexdigest(),
        "precision": resolve_dtype(loaded.model.device, dtype),
        "device": str(loaded.model.device),
        "torch": torch.__version__,
        "extensions": extensions_digest(),
    }


def _keep_others(out: Path) -> None:
    """Raises UsageError for a file, or a folder with other files than those of an evaluation."""
    if out.is_dir():
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if others and PREDICTIONS not in others:
            raise UsageError(f"--out {out} holds {others[0]}, and no evaluation — name another folder")
    elif out.exists():
        raise UsageError(f"--out {out} is a file — name a folder")


def _folder(
    root: Path, loaded: LoadedModel, task: Task, rows: RowStore, origin: dict[str, Any], limit: int | None
) -> Path:
    """A folder for this evaluation alone: another model, task or data has another name."""
    what = [origin, task.name, task.settings, str(rows.path.resolve()), rows.split, limit]
    name = hashlib.blake2b(json.dumps(what).encode(), digest_size=4).hexdigest()
    return root / "eval" / f"{loaded.checkpoint.path.stem}-{task.name}-{name}"


def _report(
    loaded: LoadedModel, rows: RowStore, task: Task, plan: Plan, lines: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    with_image = by_variant(lines)[SEEN]
    kinds = kinds_of(lines)
    return {
        "model": str(loaded.checkpoint.path),
        "data": str(rows.path),
        **({"split": rows.split} if rows.split else {}),
        "task": task.name,
        "rows": len(plan.questions),
        "pictures": plan.pictures,
        "skipped": len(plan.skipped),
        "visual_gain": visual_gain(lines),
        "metrics": [result.report() for result in measured(with_image)],
        **({"kinds": kinds} if kinds else {}),
        "bootstrap": checks(with_image),
        "skipped_reasons": dict(Counter(skipped.kind for skipped in plan.skipped)),
        "predictions": str(folder / PREDICTIONS),
    }
