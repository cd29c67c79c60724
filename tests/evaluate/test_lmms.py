"""A task's file of lmms-eval becomes a task of ours, or everything that cannot is named. Nothing in it is run."""

from __future__ import annotations

import json
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_v.core.errors import MissingInput, UsageError
from minimind_v.core.evaluate.ask import Reply
from minimind_v.core.evaluate.benchmarks import open_benchmark
from minimind_v.core.evaluate.by_task import choose_task
from minimind_v.core.evaluate.questions import questions_of
from tests.cli.harness import ASSETS, EYE, run_mmv, sighted, tiny_data

SHORT = """
task: "stars"
dataset_path: data
dataset_kwargs:
  token: True
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  top_p: 1.0
  num_beams: 1
  do_sample: false
  until:
    - "."
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
lmms_eval_specific_kwargs:
  default:
    pre_prompt: "Look: "
    post_prompt: "\\nAnswer the question using a single word or phrase."
  other_model:
    pre_prompt: "Question: "
metadata:
  - version: 0.0
"""
CHOICE = """
task: which
dataset_path: data
test_split: test
output_type: multiple_choice
doc_to_visual: image
doc_to_text: "Q: {{question.strip()}} A or B?"
doc_to_target: answer
doc_to_choice: "{{options}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with data of two questions in a split `test`."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": " What colour? ", "answer": "red", "hint": "A hint.", "options": ["red", "blue"],
         "image": {"bytes": tiny_data().picture(number).read_bytes(), "path": None}}
        for number in range(2)
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/test-00000-of-00001.parquet")
    return tmp_path


def chosen(folder, text):
    (folder / "theirs.yaml").write_text(text)
    return choose_task(str(folder / "theirs.yaml"))


def questions(task):
    data, split = task.source(None, None)
    rows = open_benchmark(data, split=split, names=task.names)
    return [
        question
        for n in range(len(rows))
        for question in questions_of(rows.row(n), n, rows.number(n), rows.location(n))
    ]


def test_a_generated_answer_is_asked_for_with_their_prompt(folder):
    task = chosen(folder, SHORT)
    assert (task.base, task.task.name, task.task.most_tokens, task.split) == ("vqa", "stars", 8, "test")
    first, _ = questions(task)
    ending = "\nAnswer the question using a single word or phrase."
    assert first.text == f"Look:  What colour? {ending}"
    assert task.task.asks(first)[0].messages[-1][1] == f"<image>\n{first.text}"
    verdict = task.task.judge(first, [Reply("Red. It is.")])
    assert (verdict.answer, verdict.score) == ("Red", 1.0)


def test_choices_are_compared_by_likelihood_and_may_stand_in_the_file(folder):
    task = chosen(folder, CHOICE)
    assert (task.base, task.task.settings["letters"]) == ("choice", False)
    first, _ = questions(task)
    assert (first.text, first.choices, first.correct) == ("Q: What colour? A or B?", ("red", "blue"), 0)
    task = chosen(folder, CHOICE.replace('"{{options}}"', "['A', 'B']").replace("answer\n", "'{{options[1]}}'\n"))
    question = questions(task)[0]
    assert (question.choices, question.correct) == (("A", "B"), None), "blue is neither A nor B"


def test_popes_metrics_are_those_of_yes_and_no(folder):
    start, end = SHORT.index("metric_list:"), SHORT.index("lmms_eval_specific")
    metrics = "metric_list:\n  - metric: pope_accuracy\n  - metric: pope_f1_score\n    higher_is_better: true\n"
    assert chosen(folder, SHORT[:start] + metrics + SHORT[end:]).base == "yesno"


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        ("[exact_match]", "metric exact_match without ignore_case and ignore_punctuation"),
        ("[accuracy]", "metric 'accuracy' has no equal here"),
        ("&f [*f]", "an alias of itself"),
        ("[2020-99-99]", "not readable YAML"),
    ],
)
def test_a_strange_list_of_metrics_is_refused_with_its_reason(folder, metrics, problem):
    start, end = SHORT.index("metric_list:"), SHORT.index("lmms_eval_specific")
    with pytest.raises(UsageError, match=problem):
        chosen(folder, f"{SHORT[:start]}metric_list: {metrics}\n{SHORT[end:]}")


def test_what_the_aliases_stand_for_is_counted(folder):
    lists = [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9) if n else 'lol'}]" for n in range(15)]
    with pytest.raises(UsageError, match="aliases included"):
        chosen(folder, SHORT + "\n".join(lists))


def test_an_index_is_an_index_even_where_choices_are_numbers(folder):
    rows = [{"question": "How many?", "answer": 1, "options": ["1", "2"]}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data/test-00000-of-00001.parquet")
    assert questions(chosen(folder, CHOICE.replace("doc_to_visual: image\n", "")))[0].correct == 1


def test_a_text_without_a_field_is_the_prompt_of_every_row(folder):
    text = SHORT.replace("doc_to_text: question", "doc_to_text: Provide a caption.").replace("Look: ", "")
    assert questions(chosen(folder, text))[0].text.startswith("Provide a caption.\nAnswer")


def test_a_file_may_include_another_and_replace_its_keys(folder):
    (folder / "_base_yaml").write_text(SHORT)
    task = chosen(folder, "include: _base_yaml\ntask: mine\ndescription: 'Hear: '\n")
    assert task.task.name == "mine"
    assert questions(task)[0].text.startswith("Hear: Look: ")
    (folder / "theirs.yaml").write_text("include: theirs.yaml\n")
    with pytest.raises(UsageError, match="include must name one file"):
        choose_task(str(folder / "theirs.yaml"))


def test_everything_without_an_equal_is_named_at_once_and_no_python_is_run(folder):
    (folder / "utils.py").write_text("raise SystemExit('was run')")
    text = """
task: pope
dataset_path: lmms-lab/POPE
output_type: generate_until
doc_to_visual: !function utils.pope_doc_to_visual
doc_to_text: !function utils.pope_doc_to_text
doc_to_target: "answer"
process_results: !function utils.pope_process_results
process_docs: !function utils.docs
repeats: 3
filter_list: [{name: x}]
num_fewshot: 0
generation_kwargs: {max_new_tokens: many, temperature: 0.7, top_p: 1.0, until: [1]}
metric_list:
  - metric: anls
  - metric: exact_match
    aggregation: !function utils.aggregate
    regexes_to_ignore: [","]
lmms_eval_specific_kwargs: {default: {format: mcq, pre_prompt: ""}}
"""
    with pytest.raises(UsageError) as error:
        chosen(folder, text)
    message = str(error.value)
    assert message.startswith(f"{folder / 'theirs.yaml'}: ")
    assert "\n" not in message
    for problem in (
        "doc_to_visual is Python (!function utils.pope_doc_to_visual), which is not run — name a field in its place, "
        "as in `doc_to_visual: image`",
        "doc_to_text is Python (!function utils.pope_doc_to_text)",
        "Python, which is not run: process_results (!function utils.pope_process_results), process_docs (!function "
        "utils.docs), metric_list.aggregation (!function utils.aggregate) — leave it out",
        "repeats has no equal", "filter_list has no equal", "max_new_tokens must be a number", "temperature 0.7",
        "until must be", "metric 'anls' has no equal", "exact_match without ignore_case and ignore_punctuation",
        "regexes_to_ignore has no equal", "lmms_eval_specific_kwargs.format",
    ):  # fmt: skip
        assert problem in message
    assert "num_fewshot" not in message
    assert "top_p" not in message


@pytest.mark.parametrize(
    "lines",
    [
        "generation_kwargs: 3", "generation_kwargs: !function a.b", "lmms_eval_specific_kwargs: [x]",
        "lmms_eval_specific_kwargs: {default: x}", "metric_list: exact_match", "metric_list: [[1], 2]",
        "dataset_kwargs: x", "output_type: [a]", "doc_to_text: 3", "doc_to_text: {a: b}", "doc_to_choice: [1, 2]",
        "1: 2", "test_split: [a]", "dataset_path: 4", "? [a, b]\n: c",
    ],
)  # fmt: skip
def test_a_value_of_a_strange_type_is_a_usage_error(folder, lines):
    usual = "dataset_path: data\ndoc_to_text: question\ndoc_to_target: answer\n"
    key = lines.partition(":")[0]
    with pytest.raises(UsageError):
        chosen(folder, "".join(line + "\n" for line in usual.splitlines() if not line.startswith(key)) + lines)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("doc_to_target: answer\n", "", "no doc_to_target — name the field of the answer"),
        ("output_type: generate_until", "output_type: loglikelihood", "output_type 'loglikelihood' has no equal here"),
        ("doc_to_text: question", "doc_to_text: '{% if a %}b{% endif %}'", "is more than a field"),
        ("doc_to_text: question", "doc_to_text: '{{question|upper}}'", "is more than a field"),
        ('task: "stars"', "task: [a, b]", "task names several tasks"),
        ("token: True", "name: x", "dataset_kwargs.name has no equal here"),
        ("max_new_tokens: 8", "max_new_tokens: !!python/name:os.system 8", "not readable YAML"),
    ],
)
def test_a_file_that_cannot_be_read_so_is_refused(folder, old, new, problem):
    assert old in SHORT
    with pytest.raises(UsageError, match=problem):
        chosen(folder, SHORT.replace(old, new))


def test_the_data_are_the_files_own_or_those_that_are_given(folder):
    away = chosen(folder, SHORT.replace("dataset_path: data", "dataset_path: lmms-lab/stars"))
    with pytest.raises(MissingInput, match="stars: its data lmms-lab/stars is not on this machine — name it with --d"):
        away.source(None, None)
    assert away.source(folder / "data", None) == (folder / "data", "test")
    assert away.source(folder / "data", "train")[1] == "train"
    file = next((folder / "data").iterdir())
    assert away.source(file, None) == (file, None)
    named = SHORT.replace("dataset_path: data", "dataset_path: parquet").replace(
        "token: True", f"data_files: {{test: {shlex.quote(str(file))}}}"
    )
    assert chosen(folder, named).source(None, None) == (file, None)


def test_the_command_measures_by_their_file(folder):
    chosen(folder, SHORT)
    paths = ("--model", sighted(), "--vision-model", EYE, "--tokenizer", ASSETS, "--device", "cpu")
    done = run_mmv("eval", "--task", "theirs.yaml", *paths, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["rows"], report["split"]) == ("stars", 2, "test")
