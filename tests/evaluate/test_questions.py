"""Small files of the benchmarks' shapes become the same questions; what is missing is named."""

from __future__ import annotations

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_v.core.errors import DataError, MissingInput, RowError, UsageError
from minimind_v.core.evaluate.benchmarks import open_benchmark, read_picture
from minimind_v.core.evaluate.questions import questions_of
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.evaluate.template import Template
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


def test_scienceqa_without_a_split_is_its_test_split_and_says_so(tmp_path):
    problems = {
        str(n): {"question": "Q", "choices": ["a", "b"], "answer": 0, "split": split}
        for n, split in enumerate(["train", "val", "test"])
    }
    notices = []
    data = dump(tmp_path / "problems.json", problems)
    rows = open_benchmark(data, say=notices.append)
    assert [rows.row(index).extra["pid"] for index in range(len(rows))] == ["2"]
    assert "reading the split test (1 question)" in notices[0]
    assert [len(open_benchmark(data, split=split)) for split in ("val", "all")] == [1, 3]
    with pytest.raises(UsageError, match="has only the splits"):
        open_benchmark(data, split="minitest")


@pytest.mark.parametrize(
    ("whole", "annotations", "expected"),
    [
        ({"data": [{"question": "Q", "answer": "a"}, None, 7]}, None, ["a", "row", "row"]),
        ({"1": {"question": "Q", "answer": "a"}, "2": None}, None, ["a", "row"]),
        (
            {"questions": [None, {"question": "Q", "question_type_id": [1], "answer": "a"}], "question_type": {"k": 1}},
            None,
            ["row", "a"],
        ),
        (
            {"questions": [{"question": "Q", "question_id": name} for name in ("1", 2, [3], 4)] + [{"question": "Q"}]},
            [None, {"question_id": [3]}, {"answers": ["x"]}, *({"question_id": n, "answers": ["a"]} for n in (1, "2"))],
            ["a", "a", "", "", ""],
        ),
    ],
)
def test_a_record_that_cannot_be_read_costs_only_itself(tmp_path, whole, annotations, expected):
    if annotations is not None:
        dump(tmp_path / "v2_annotations.json", {"annotations": annotations})
    rows = open_benchmark(dump(tmp_path / "v2_questions.json", whole))
    truths = []
    for index in range(len(rows)):
        try:
            [question] = questions_of(rows.row(index), index, rows.number(index), rows.location(index))
            truths.append("".join(question.truths))
        except RowError as error:
            truths.append("row" if "not an object" in str(error) else str(error))
    assert truths == expected


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
    names = {"question": Template("frage"), "answer": Template("antwort"), "image": Template("bild")}
    [question] = read(data, pictures("a.jpg"), names)
    assert (question.text, question.truths, question.images) == ("Was?", ("rot",), ("a.jpg",))


def test_a_users_name_counts_before_all_usual_ones(tmp_path, pictures):
    row = {
        "question_id": 1,
        "own_id": 2,
        "prompt": "Q?",
        "answers": ["a"],
        "label": "b",
        "image": "a.jpg",
        "img": "b.jpg",
    }
    data = write_rows(tmp_path / "rows.jsonl", [row | {"category": "x", "level": "y"}])
    own = {"id": "own_id", "answer": "label", "image": "img", "kind": "level"}
    [question] = read(data, pictures("a.jpg", "b.jpg"), {name: Template(field) for name, field in own.items()})
    assert (question.id, question.truths, question.images, question.kind) == ("2", ("b",), ("b.jpg",), "y")


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


@pytest.mark.parametrize(
    ("choices", "answer", "more", "correct"),
    [
        (["2", "3", "4"], 3, {}, 1),  # a value
        (["2", "3", "4"], 2, {}, 0),
        (["2", "3", "4"], 1, {}, 1),  # no value, so a number
        (["2", "3", "4"], 3, {"lecture": ""}, None),  # ScienceQA numbers its choices
        (["0", "1", "2"], 1, {"pid": "7"}, 1),
        (["1", "2", "3"], 1, {"pid": "7"}, 1),
        (["1", "2", "3"], "1", {}, 0),
        (["1 apple", "2"], 1, {}, 1),  # not all are numbers
        (["1.5", "2"], 2, {}, 1),
        (["4", "5"], "B", {}, 1),
        (["4", "5"], 5, {"answer_index": 0}, 0),
        (["a", "b"], None, {"correct_choice_idx": 1}, 1),
        (["a", "b"], "a", {"correct_choice_idx": 7}, 0),
    ],
)
def test_a_whole_number_that_is_one_of_numeric_choices_is_that_choice(tmp_path, choices, answer, more, correct):
    row = {"question": "How many?", "choices": choices, "answer": answer} | more
    [question] = read(write_rows(tmp_path / "rows.jsonl", [row]))
    assert question.correct == correct
    assert question.truths == ((choices[correct],) if correct is not None else (str(answer),))


@pytest.mark.parametrize(
    ("fields", "choices", "truths"),
    [
        ({"options": '["a cat", "a dog"]', "answer": "B"}, ("a cat", "a dog"), ("a dog",)),
        ({"options": "['a cat', \"a dog's\"]", "answer": "A"}, ("a cat", "a dog's"), ("a cat",)),  # as MMMU writes it
        ({"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "B"}, ("x", "y"), ("y",)),
        ({"A": "x", "B": "y", "C": "nan", "answer": "A"}, ("x", "y"), ("x",)),
        ({"option_a": "x", "option_b": "y", "answer": "B"}, ("x", "y"), ("y",)),
        ({"answers": '["red", "dark red"]'}, (), ("red", "dark red")),
        ({"answers": {"answer": ["red", "blue"], "answer_id": [1, 2]}}, (), ("red", "blue")),
        ({"answer": "[left] and right"}, (), ("[left] and right",)),
        ({"answer": "[" * 3000}, (), ("[" * 3000,)),
    ],
)
def test_lists_are_read_in_every_form_in_which_tables_hold_them(tmp_path, fields, choices, truths):
    [question] = read(write_rows(tmp_path / "rows.jsonl", [{"question": "Which?"} | fields]))
    assert (question.choices, question.truths) == (choices, truths)


@pytest.mark.parametrize(
    ("options", "answer", "truth"),
    [
        ({"1": "cat", "2": "dog", "3": "cow"}, "2", "dog"),
        ({"1": "cat", "2": "dog", "3": "cow"}, 2, "dog"),
        ({"1": "cat", "2": "dog", "3": "cow"}, "B", "dog"),
        ({"1": "cat", "2": "dog", "3": "cow"}, 0, None),
        ({"1": "2", "2": "1"}, "1", "2"),
        ({"B": "cat", "C": "dog", "D": "cow"}, "C", "dog"),
        ({"B": "cat", "C": "dog", "D": "cow"}, "(c)", "dog"),
        ({"B": "cat", "C": "dog", "D": "cow"}, "A", None),
        ({"1": "cat", "10": "cow", "2": "dog"}, "C", "cow"),
        ({"text": ["cat", "dog"], "label": ["1", "2"]}, "1", "cat"),
        (["", "cat", "dog"], "B", "cat"),
        ([None, "cat", "dog"], 1, "cat"),
        (["", "cat", "dog"], "A", None),
        (["cat", "dog", None], "C", None),
        (["nan", "cat"], "A", "nan"),
        (["4", "5"], 5.0, "5"),
        (["a", "b"], ["B", "B"], "b"),
        (["a", "b", "c"], ["B", "C"], None),
    ],
)
def test_a_key_a_letter_and_a_number_mean_the_choice_at_their_place(tmp_path, options, answer, truth):
    row = {"question": "Which?", "options": options, "answer": answer}
    [question] = read(write_rows(tmp_path / "rows.jsonl", [row]))
    assert (question.correct, question.correct is None or question.choices[question.correct]) == (
        (None, True) if truth is None else (question.choices.index(truth), truth)
    )


def test_numbered_keys_are_sorted_as_numbers_and_absent_columns_at_the_end_left_out(tmp_path):
    rows = [
        {"question": "Q", "options": {"1": "a", "10": "c", "2": "b"}, "answer": "10"},
        {"question": "Q", "A": None, "B": "cat", "C": "dog", "D": float("nan"), "answer": "B"},
    ]
    keyed, columns = read(write_rows(tmp_path / "rows.jsonl", rows))
    assert (keyed.choices, columns.choices, columns.truths) == (("a", "b", "c"), ("cat", "dog"), ("cat",))


def test_several_right_choices_are_refused_by_name(tmp_path):
    row = {"question": "Q", "options": ["a", "b", "c"], "answer": ["B", "C"]}
    [question] = read(write_rows(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(RowError, match="no single right choice"):
        TASKS["choice"]("choice", {}).check(question)


@pytest.mark.parametrize(
    ("fields", "identity", "truths"),
    [
        ({"id": 1234567.0, "answer": 1234567.0}, "1234567", ("1234567",)),
        ({"answer": 0.1234567}, "1", ("0.1234567",)),
        ({"answer": "[0, 1]"}, "1", ("[0, 1]",)),
        ({"answers": ["nan", None, "x"]}, "1", ("nan", "x")),
        ({"options": ["a", "b"], "answer_index": "1"}, "1", ("b",)),
        ({"options": ["a", "b"], "answer_index": 1.0}, "1", ("b",)),
    ],
)
def test_numbers_and_texts_keep_what_they_say(tmp_path, fields, identity, truths):
    [question] = read(write_rows(tmp_path / "rows.jsonl", [{"question": "Q"} | fields]))
    assert (question.id, question.truths) == (identity, truths)


def picture_struct(data=PICTURE):
    return None if data is None else {"bytes": data, "path": None}


def test_the_parquet_forms_of_the_benchmarks_are_read(tmp_path):
    """The columns of the repositories that `mmv download --task` names, with a picture in the row."""
    shapes = {
        "pope": {"id": "0", "question_id": "1", "question": "Is there a dog?", "answer": "no", "image_source": "COCO_1",
                 "category": "adversarial", "image": picture_struct()},
        "mme": {"question_id": "code/1.png", "image": picture_struct(), "question": "Is it? yes or no", "answer": "No",
                "category": "code"},
        "vqav2": {"question_type": "what", "multiple_choice_answer": "cat", "image_id": 42, "answer_type": "other",
                  "answers": [{"answer": "cat", "answer_confidence": "yes", "answer_id": 1}], "question_id": 42000,
                  "question": "What?", "image": picture_struct()},
        "textvqa": {"image_id": "ab", "question_id": 3, "question": "Time?", "question_tokens": ["time"],
                    "image": picture_struct(), "image_width": 9, "flickr_original_url": "https://x.org/a.jpg",
                    "answers": ["5:41"] * 10, "image_classes": ["Clock"], "ocr_tokens": ["5:41"]},
        "mmbench": {"index": 241, "question": "Which?", "hint": "nan", "answer": "B", "A": "a cat", "B": "a dog",
                    "C": "nan", "D": "nan", "category": "identity", "image": picture_struct(), "source": "x",
                    "l2-category": "y", "comment": "nan", "split": "dev"},
        "seed": {"answer": "C", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "data_id": "x_1",
                 "data_type": "image", "question": "How many?", "question_id": "7", "question_type_id": 4,
                 "image": [picture_struct()], "segment": []},
        "scienceqa": {"image": picture_struct(), "question": "Which?", "choices": ["1", "2", "3"], "answer": 1,
                      "hint": "Look.", "task": "closed choice", "grade": "grade2", "subject": "natural science",
                      "topic": "biology", "category": "c", "skill": "s", "lecture": "", "solution": "So."},
        "coco": {"question_id": "1.jpg", "image": picture_struct(), "question": "Describe the image.",
                 "answer": ["a cat", "the cat"], "id": 1, "license": 3, "file_name": "1.jpg",
                 "coco_url": "http://x.org/1.jpg", "height": 9, "width": 9, "date_captured": "2013"},
        "llava": {"question_id": 0, "question": "What?", "image": picture_struct(), "category": "conv",
                  "caption": "A hill.", "gpt_answer": "A high hill.", "image_id": "001.jpg"},
    }  # fmt: skip
    expected = {
        "pope": (("no",), None), "mme": (("No",), None), "vqav2": (("cat",), None), "textvqa": (("5:41",) * 10, None),
        "mmbench": (("a dog",), 1), "seed": (("3",), 2), "scienceqa": (("2",), 1),
        "coco": (("a cat", "the cat"), None), "llava": (("A high hill.",), None),
    }  # fmt: skip
    for name, row in shapes.items():
        file = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([row]), file)
        [question] = read(file)
        assert len(question.images) == 1, name
        assert (question.truths, question.correct) == expected[name], name
        assert "nan" not in question.text, name


def test_a_row_whose_picture_is_null_is_a_question_without_one(tmp_path):
    rows = [
        {"question": "Which?", "image": picture_struct(data), "choices": ["x", "y"], "answer": 0, "lecture": None}
        for data in (PICTURE, None)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    shown, plain = read(tmp_path / "rows.parquet")
    assert (len(shown.images), plain.images, plain.correct) == (1, (), 0)
