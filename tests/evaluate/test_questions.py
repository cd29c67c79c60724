"""Small files of the benchmarks' shapes become the same questions; what is missing is named."""

from __future__ import annotations

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_v.core.errors import DataError, MissingInput, RowError
from minimind_v.core.evaluate.benchmarks import open_benchmark, read_picture
from minimind_v.core.evaluate.questions import questions_of
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.rows.forms import DESCRIBE, DESCRIBE_CHINESE
from tests.cli.harness import tiny_data, write_rows

PICTURE = tiny_data().picture(0).read_bytes()


@pytest.fixture
def pictures(tmp_path):
    """`pictures(name, …)` is a folder with pictures of these names."""

    def make(*names):
        for name in names:
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PICTURE)
        return tmp_path / "images"

    return make


def dump(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def read(data, images=None, names=None):
    """All questions of a file, and the bytes of their pictures."""
    rows = open_benchmark(data, images, names=names)
    questions = []
    for index in range(len(rows)):
        row = rows.row(index)
        for question in questions_of(row, index, rows.number(index), rows.location(index)):
            questions.append(question)
            for position, name in enumerate(question.images):
                assert read_picture(rows, row, index, position, name) == PICTURE
    return questions


def test_vqav2_is_two_files_of_which_either_is_named(tmp_path, pictures):
    questions = {"questions": [{"image_id": 42, "question": "What is it?", "question_id": 42000}], "info": {}}
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(["cat", "dog"])]
    annotation = {
        "question_id": 42000, "image_id": 42, "answers": answers, "answer_type": "other",
        "question_type": "what is", "multiple_choice_answer": "cat",
    }  # fmt: skip
    asked = dump(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", questions)
    annotated = dump(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [annotation]})
    images = pictures("COCO_val2014_000000000042.jpg")
    for file in (asked, annotated):
        [question] = read(file, images)
        assert (question.id, question.text, question.truths, question.kind) == (
            "42000", "What is it?", ("cat", "dog"), "other",
        )  # fmt: skip
        assert question.images == ("42",)
    annotated.unlink()
    with pytest.raises(MissingInput, match="has only the questions — put the file with the annotations beside it"):
        read(asked, images)


def test_gqa_is_an_object_of_questions_by_id(tmp_path, pictures):
    data = dump(
        tmp_path / "testdev.json",
        {"201": {"imageId": "n9", "question": "Red?", "answer": "no", "types": {"structural": "verify"}}},
    )
    [question] = read(data, pictures("n9.jpg"))
    assert (question.id, question.truths, question.kind) == ("201", ("no",), "verify")


def test_textvqa_is_a_list_below_data(tmp_path, pictures):
    record = {"question": "What time?", "image_id": "0a1f", "question_id": 3, "answers": ["5:41"] * 10}
    data = dump(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [record]})
    [question] = read(data, pictures("0a1f.jpg"))
    assert question.truths == ("5:41",) * 10


def test_pope_calls_the_question_text_and_the_answer_label(tmp_path, pictures):
    data = write_rows(
        tmp_path / "pope.json",
        [{"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "Is there a cat?", "label": "yes"}],
    )
    [question] = read(data, pictures("COCO_val2014_1.jpg"))
    assert (question.text, question.truths) == ("Is there a cat?", ("yes",))


def test_mmstar_has_its_choices_in_the_question(tmp_path):
    text = "What colour?\nOptions: A: red, B: light blue, C: green, D: none"
    table = pa.table({
        "index": [7], "question": [text], "image": [{"bytes": PICTURE, "path": None}], "answer": ["B"],
        "category": ["coarse perception"], "l2_category": ["image style"],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "mmstar.parquet")
    [question] = read(tmp_path / "mmstar.parquet")
    assert question.choices == ("red", "light blue", "green", "none")
    assert (question.correct, question.truths, question.kind) == (1, ("light blue",), "coarse perception")


def test_mmbench_has_a_column_for_each_choice_and_a_hint(tmp_path):
    encoded = base64.b64encode(PICTURE).decode()
    data = tmp_path / "mmbench.tsv"
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    cells = ["241", "Which?", "Look at the left.", "a cat", "a dog", "", "nan", "B", "identity", encoded]
    data.write_text("\n".join("\t".join(line) for line in (columns, cells)) + "\n")
    [question] = read(data)
    assert question.choices == ("a cat", "a dog")
    assert (question.id, question.correct, question.text) == ("241", 1, "Look at the left.\nWhich?")


def test_seed_bench_has_choice_a_to_d_and_kinds_by_number(tmp_path, pictures):
    record = {
        "answer": "C", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4",
        "data_id": "1454426_2591111986",
        "question": "How many?", "question_id": "101669", "question_type_id": 4,
    }  # fmt: skip
    data = dump(tmp_path / "SEED-Bench.json", {"questions": [record], "question_type": {"Instances Counting": 4}})
    [question] = read(data, pictures("1454426_2591111986.jpg"))
    assert (question.choices, question.correct, question.kind) == (("1", "2", "3", "4"), 2, "Instances Counting")


def test_scienceqa_numbers_its_choices_and_has_a_folder_for_each_image(tmp_path, pictures):
    problems = {
        "21": {"question": "Which?", "choices": ["salt", "sugar"], "answer": 1, "hint": "", "image": "image.png",
               "split": "test", "subject": "natural science"},
        "22": {"question": "Why?", "choices": ["so", "not"], "answer": 0, "hint": "", "image": None, "split": "test"},
    }  # fmt: skip
    shown, plain = read(dump(tmp_path / "problems.json", problems), pictures("test/21/image.png"))
    assert (shown.correct, shown.truths, shown.kind) == (1, ("sugar",), "natural science")
    assert plain.images == ()


def test_mme_and_llava_bench_are_records(tmp_path, pictures):
    images = pictures("a.png", "001.jpg")
    mme = {
        "question_id": "code/1.png",
        "image": "a.png",
        "question": "Is it C++? yes or no.",
        "answer": "No",
        "category": "code",
    }
    bench = {"question_id": 0, "image": "001.jpg", "text": "What is it?", "category": "conv", "gpt_answer": "A hill."}
    first, second = read(write_rows(tmp_path / "rows.jsonl", [mme, bench]), images)
    assert (first.truths, first.kind) == (("No",), "code")
    assert (second.text, second.truths) == ("What is it?", ("A hill.",))


def test_coco_captions_of_an_image_are_one_question(tmp_path, pictures):
    captions = [{"image_id": 5, "id": n, "caption": text} for n, text in enumerate(["a cat", "the cat"])]
    data = dump(tmp_path / "captions.json", {"images": [{"id": 5, "file_name": "5.jpg"}], "annotations": captions})
    questions = read(data, pictures("5.jpg"))
    [question] = TASKS["caption"]("caption", {}).select(questions)
    assert (question.text, question.truths) == (DESCRIBE, ("a cat", "the cat"))


def test_a_chinese_caption_is_asked_for_in_chinese(tmp_path, pictures):
    data = write_rows(tmp_path / "rows.jsonl", [{"image": "a.jpg", "caption": "一只猫"}])
    assert read(data, pictures("a.jpg"))[0].text == DESCRIBE_CHINESE


def test_every_turn_of_a_conversation_is_a_question_after_the_true_turns(tmp_path, pictures):
    texts = ["<image>\nWhat?", "A cat.", "And?", "No."]
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    data = write_rows(tmp_path / "rows.jsonl", [{"conversations": turns, "image": "a.jpg"}])
    first, second = read(data, pictures("a.jpg"))
    assert (first.id, first.truths, second.id, second.truths) == ("1.1", ("A cat.",), "1.2", ("No.",))
    assert [content for _, content in second.messages] == texts[:3]
    assert second.images == ("a.jpg",)


def test_a_users_names_of_fields_are_read_as_the_usual_ones(tmp_path, pictures):
    data = write_rows(tmp_path / "rows.jsonl", [{"frage": "Was?", "antwort": "rot", "bild": "a.jpg"}])
    names = {"question": "frage", "answer": "antwort", "image": "bild"}
    [question] = read(data, pictures("a.jpg"), names)
    assert (question.text, question.truths, question.images) == ("Was?", ("rot",), ("a.jpg",))


@pytest.mark.parametrize(
    ("task", "record", "missing"),
    [
        ("choice", {"question": "Which?", "answer": "A"}, "no choices"),
        ("choice", {"question": "Which?", "choices": ["a", "b"]}, "no right choice"),
        ("vqa", {"question": "Which?", "category": "x"}, "no true answer .*in `question`, `category`"),
        ("yesno", {"question": "Which?", "answer": "red"}, "no answer of yes or no"),
    ],
)
def test_what_a_task_misses_is_named(tmp_path, task, record, missing):
    [question] = read(write_rows(tmp_path / "rows.jsonl", [record]))
    with pytest.raises(RowError, match=missing):
        TASKS[task](task, {}).check(question)


@pytest.mark.parametrize("answer", ["²", "10" * 3000, "-1", 2, True])
def test_an_answer_that_is_no_number_of_a_choice_is_none_of_them(tmp_path, answer):
    [question] = read(write_rows(tmp_path / "rows.jsonl", [{"question": "Q", "choices": ["a", "b"], "answer": answer}]))
    assert question.correct is None


@pytest.mark.parametrize("name", ["²", "9" * 5000])
def test_an_image_id_that_is_no_number_names_no_image(tmp_path, pictures, name):
    rows = open_benchmark(write_rows(tmp_path / "rows.jsonl", [{"question": "Q", "answer": "a"}]), pictures("a.jpg"))
    with pytest.raises(RowError):
        read_picture(rows, rows.row(0), 0, 0, name)


def test_halves_that_do_not_belong_together_are_refused(tmp_path):
    dump(tmp_path / "a_questions.json", {"questions": [{"question_id": 1, "question": "What?", "image_id": 1}]})
    data = dump(tmp_path / "a_annotations.json", {"annotations": [{"question_id": 2, "answers": [], "image_id": 1}]})
    with pytest.raises(DataError, match="no question_id has its other half"):
        read(data)
