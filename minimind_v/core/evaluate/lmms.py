"""A task's YAML file of lmms-eval as a task of ours, where it is plain data: none of its Python is run.

`!function` stands for Python beside the file. It is refused by name, as is every key and metric without an equal here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minimind_v.core.config.settings import limit_tree, read_yaml_text
from minimind_v.core.errors import UsageError
from minimind_v.core.evaluate.template import Template

MARKS = {"dataset_path", "output_type", "doc_to_text", "doc_to_target", "doc_to_visual", "include", "group"}
# What changes no answer and no score of ours.
WITHOUT_EFFECT = {
    *("metadata", "tag", "group", "task_alias", "group_alias", "full_docs", "training_split", "fewshot_split"),
    *("fewshot_delimiter", "target_delimiter", "model_specific_generation_kwargs"),
}
READ = {
    *("task", "dataset_path", "dataset_name", "dataset_kwargs", "test_split", "validation_split", "output_type"),
    *("doc_to_visual", "doc_to_text", "doc_to_target", "doc_to_choice", "description", "generation_kwargs"),
    *("metric_list", "lmms_eval_specific_kwargs"),
}
UNUSED = {"num_fewshot": 0, "repeats": 1, "should_decontaminate": False}  # the only values without an effect
# The metrics that are measured here, by the kind of output: our task that has them.
POPE = ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio")
METRICS = {
    "generate_until": {"exact_match": "vqa", "bleu": "caption", "chrf": "caption", **dict.fromkeys(POPE, "yesno")},
    "multiple_choice": {"acc": "choice"},
}
PLAIN_METRIC = {"metric", "aggregation", "higher_is_better"}
LOOSE = {"ignore_case", "ignore_punctuation"}  # as VQA's normalisation compares answers
FORMATS = ("parquet", "json", "csv", "arrow")  # instead of a dataset's name, where its files are named
FIELDS = {"doc_to_text": "question", "doc_to_target": "answer", "doc_to_visual": "image", "doc_to_choice": "options"}
UNTIL = ["\n\n"]  # what ends an answer where a file does not say
DEEPEST = 8  # files that include each other


@dataclass(frozen=True)
class Theirs:
    """A task of lmms-eval in our terms."""

    name: str
    task: str  # in TASKS
    settings: dict[str, Any]
    until: tuple[str, ...]
    names: dict[str, Template]
    data: Path
    split: str | None


@dataclass(frozen=True)
class Function:
    """A reference to Python, which is not run."""

    name: str


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: Function(str(node.value)))


def is_theirs(path: Path) -> bool:
    """Whether a YAML file has keys of lmms-eval. Raises MissingInput or UsageError where it cannot be read."""
    try:
        node = yaml.compose(read_yaml_text(path), Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        return False
    keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    return any(isinstance(key, str) and key in MARKS for key in keys)


def translate(path: Path) -> Theirs:
    """The task of a file. Raises UsageError, naming everything that has no equal here, or MissingInput."""
    return _Translation(path, _read(path)).result()


def _read(path: Path, depth: int = 0) -> dict[str, Any]:
    """The keys of a file and of those that it includes, its own first."""
    loader = _Loader(read_yaml_text(path))
    try:
        node = loader.get_single_node()
        if node is not None:
            limit_tree(path, node)
        own = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{path}: not readable YAML ({' '.join(str(error).split()):.120})") from None
    if not isinstance(own, dict):
        raise UsageError(f"{path}: not a mapping of keys to values")
    base = own.pop("include", None)
    if base is None:
        return own
    if not isinstance(base, str) or depth == DEEPEST:
        raise UsageError(f"{path}: include must name one file, and files may include each other {DEEPEST} deep")
    return _read(path.parent / base, depth + 1) | own


def _functions(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """All references to Python, with their keys."""
    if isinstance(value, Function):
        yield key, value.name
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _functions(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _functions(inner, key)


class _Translation:
    """What one file says, and what is wrong with it."""

    def __init__(self, path: Path, keys: dict[str, Any]) -> None:
        self.path, self.keys = path, keys
        self.problems: list[str] = []

    def result(self) -> Theirs:
        keys = self.keys
        functions = list(_functions(keys, ""))
        for key, name in functions:
            if key in FIELDS:
                self._refuse(
                    f"{key} is Python (!function {name}), which is not run — name a field in its place, as in "
                    f"`{key}: {FIELDS[key]}`"
                )
        if others := [f"{key} (!function {name})" for key, name in functions if key not in FIELDS]:
            self._refuse(f"Python, which is not run: {', '.join(others)} — leave it out")
        for key, value in keys.items():
            if key not in READ | WITHOUT_EFFECT and value != UNUSED.get(key) and not isinstance(value, Function):
                self._refuse(f"{key} has no equal here — leave it out, or write a task in Python")
        task = self._task()
        most_tokens, until = self._generation()
        names = self._names()
        data, split = self._data()
        if self.problems:
            raise UsageError(f"{self.path}: {'; '.join(self.problems)}")
        settings: dict[str, Any] = {"letters": False} if task == "choice" else {}
        if most_tokens is not None:
            settings["most_tokens"] = most_tokens
        return Theirs(keys.get("task") or self.path.stem, task, settings, until, names, data, split)

    def _refuse(self, problem: str) -> None:
        self.problems.append(problem)

    def _text(self, key: str) -> str | None:
        value = self.keys.get(key)
        if value is None or isinstance(value, str):
            return value or None
        if not isinstance(value, Function):
            self._refuse(f"{key} must be a text, not {value!r:.40}")
        return None

    def _mapping(self, key: str) -> dict[str, Any]:
        value = self.keys.get(key) or {}
        if not isinstance(value, Mapping | Function):
            self._refuse(f"{key} must be a mapping, not {value!r:.40}")
        return dict(value) if isinstance(value, Mapping) else {}

    def _task(self) -> str:
        if not isinstance(self.keys.get("task", ""), str):
            self._refuse("task names several tasks — name the file of one of them")
        output = self.keys.get("output_type", "generate_until")
        if not isinstance(output, str) or output not in METRICS:
            self._refuse(f"output_type {output!r:.40} has no equal here — there are {', '.join(METRICS)}")
            return ""
        metrics = self.keys.get("metric_list")
        if not metrics:
            return next(iter(METRICS[output].values()))
        if not isinstance(metrics, list):
            self._refuse("metric_list must be a list of metrics")
            return ""
        tasks = sorted({task for metric in metrics for task in self._metric(metric, output)})
        if len(tasks) > 1:
            self._refuse(f"metric_list has metrics of several tasks here ({', '.join(tasks)}) — keep those of one")
        return tasks[0] if tasks else ""

    def _metric(self, metric: Any, output: str) -> list[str]:
        """Our task that has the metric, if any."""
        metric = metric if isinstance(metric, dict) else {"metric": metric}
        name = metric.get("metric")
        task = METRICS[output].get(name) if isinstance(name, str) else None
        if task is None:
            if not isinstance(name, Function):
                self._refuse(f"metric {name!r:.40} has no equal here — there are {', '.join(METRICS[output])}")
            return []
        extra = {key for key, value in metric.items() if key not in PLAIN_METRIC and value is not False}
        if missing := LOOSE - extra if task == "vqa" else set():
            self._refuse(
                f"metric {name} without {' and '.join(sorted(missing))}: answers are compared here without case and "
                "marks — say so, with `true`"
            )
        if strange := extra - (LOOSE if task == "vqa" else set()):
            self._refuse(f"metric {name}: {', '.join(sorted(strange))} has no equal here — leave it out")
        return [task]

    def _generation(self) -> tuple[int | None, tuple[str, ...]]:
        """Tokens of the longest answer, and what ends one."""
        settings = self._mapping("generation_kwargs")
        most_tokens, until = settings.pop("max_new_tokens", None), settings.pop("until", UNTIL) or []
        until = [until] if isinstance(until, str) else until
        if most_tokens is not None and (type(most_tokens) is not int or most_tokens < 1):
            self._refuse(f"generation_kwargs.max_new_tokens must be a number of tokens, not {most_tokens!r:.40}")
        if not isinstance(until, list) or not all(isinstance(end, str) and end for end in until):
            self._refuse("generation_kwargs.until must be a text or a list of texts")
            until = []
        settings.pop("top_p", None)  # of no effect where the likeliest token is taken
        for key, value in settings.items():
            if value not in {"temperature": (0, None), "do_sample": (False, None), "num_beams": (1, None)}.get(key, ()):
                self._refuse(
                    f"generation_kwargs.{key} {value!r:.40}: the likeliest answer is taken here — leave it out"
                )
        return most_tokens, tuple(until)

    def _names(self) -> dict[str, Template]:
        """What of a row is the question, the answer, the image and the choices."""
        before, behind = self._prompts()
        text, target, image = (self._text(key) for key in ("doc_to_text", "doc_to_target", "doc_to_visual"))
        for key, value in (("doc_to_text", text), ("doc_to_target", target)):
            if not value and not isinstance(self.keys.get(key), Function):
                self._refuse(f"no {key} — name the field of the {FIELDS[key]}")
        names = {"hint": Template("", is_literal=True)}  # the text is the whole prompt
        if text:
            whole = before + (f"{{{{{text}}}}}" if len(text.split()) == 1 and "{{" not in text else text) + behind
            names["question"] = Template(whole if before or behind else text, is_literal=True)
        if target:
            names["answer"] = Template(target, is_literal=True)
        if image:
            names["image"] = Template(image)
        if choices := self._choices():
            names |= {"choices": choices, **({"answer_index": names["answer"]} if target else {})}
        for template in names.values():
            try:
                _ = template.fields
            except UsageError as error:
                self._refuse(str(error))
        return names

    def _prompts(self) -> tuple[str, str]:
        """The texts before and behind the question."""
        kwargs = self._mapping("lmms_eval_specific_kwargs")
        own = (
            kwargs.get("default", {key: value for key, value in kwargs.items() if not isinstance(value, Mapping)}) or {}
        )
        own = own if isinstance(own, Mapping) else {"default": own}
        for key, value in own.items():
            if key not in ("pre_prompt", "post_prompt") and value and not isinstance(value, Mapping | Function):
                self._refuse(f"lmms_eval_specific_kwargs.{key} is read by Python only — leave it out")
        before, behind = (own.get(key) or "" for key in ("pre_prompt", "post_prompt"))
        return f"{self._text('description') or ''}{before}", str(behind)

    def _choices(self) -> Template | None:
        value = self.keys.get("doc_to_choice")
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            if all(isinstance(choice, str) for choice in value):
                return Template(tuple(value))
            self._refuse("doc_to_choice must be a list of texts — put them in quotes")
        elif isinstance(value, str):
            return Template(value)
        elif self.keys.get("output_type") == "multiple_choice" and not isinstance(value, Function):
            self._refuse("no doc_to_choice — name the field of the choices")
        return None

    def _data(self) -> tuple[Path, str | None]:
        """The data on this machine: a folder or a file, relative to the working folder or to the task's."""
        kwargs = self._mapping("dataset_kwargs")
        files = kwargs.pop("data_files", None)
        for key in ("token", "load_from_disk", "cache_dir"):
            kwargs.pop(key, None)
        for key in kwargs:
            self._refuse(f"dataset_kwargs.{key} has no equal here — leave it out")
        split = self._text("test_split") or self._text("validation_split")
        name = self._text("dataset_path") or ""
        if name in FORMATS and files is not None:
            file, split = (files.get(split) if isinstance(files, Mapping) else files), None
            if not isinstance(file, str):
                self._refuse("dataset_kwargs.data_files must name one file of the split")
            name = str(file)
        data = next((path for path in (Path(name), self.path.parent / name) if path.exists()), Path(name))
        inner = data / str(self.keys.get("dataset_name") or "")
        data = inner if inner.is_dir() else data
        return data, split.strip() if split and not data.is_file() else None
