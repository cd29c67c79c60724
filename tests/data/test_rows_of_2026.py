"""A parquet file as minimind-3v publishes it, with all its oddities, in the layouts of both generations."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from minimind_v.core.curate import check as checking
from minimind_v.core.curate.convert import convert
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.dataset import BrokenRow, RowDataset
from minimind_v.core.data.loader import BatchPlan, load_batches
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.rows.stores import open_rows
from tests.tokenizers_made import thinking_tokenizer

PATCHES, SIZE = 4, 16


def jpeg(width: int, height: int, colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def row_of(question: str, answer: str, **fields) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]


BLACK, RED, BLUE = jpeg(8, 8, "black"), jpeg(40, 20, "red"), jpeg(20, 50, "blue")
CALL = '[{"name": "count", "arguments": {"what": "cups"}}]'
ROWS = {  # name: the conversation, its pictures
    "image": (row_of("<image>\nWhat?", "A cup."), [RED]),
    "text with a black picture": (row_of("Hello", "Hi."), [BLACK]),
    "two images that touch": (row_of("<image><image>Same?", "No."), [RED, BLUE]),
    "reasoning in the content": (row_of("<image>\n1+1", "<think>\none more\n</think>\n\n2"), [RED]),
    "reasoning in a field": (row_of("<image>\n1+1", "2", reasoning_content="one more"), [RED]),
    "an empty block": (row_of("<image>\n1+1", "<think>\n\n</think>\n\n2"), [RED]),
    "tools": (
        [
            {"role": "system", "content": "Count.", "tools": '[{"name": "count"}]'},
            *row_of("<image>\nHow many?", None, tool_calls=CALL),
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Three."},
        ],
        [RED],
    ),
    "tags in a question": (row_of("<image>\nWhat is <think>?", "A tag."), [BLUE]),
    "own system": ([{"role": "system", "content": "Be terse."}, *row_of("<image>", "Red.")], [RED]),
    "several turns": ([*row_of("<image>\nWhat?", "A cup."), *row_of("Sure?", "Yes.")], [RED]),
    "a mark too many": (row_of("<image><image>", "No."), [RED]),
    "a foreign mark": (row_of("<|image_pad|>What?", "No."), [RED]),
    "no answer": (row_of("<image>", "No.")[:1], [RED]),
    "a broken picture": (row_of("<image>", "No."), [b"\xff\xd8 cut"]),
}
UNREADABLE = {"a foreign mark", "no answer"}  # by their text
BROKEN = UNREADABLE | {"a mark too many", "a broken picture"}
FORMS = {
    "one binary or none": lambda pictures: pictures[0] if len(pictures) == 1 else None,
    "a list of binaries": lambda pictures: pictures,
}


@pytest.fixture
def write(tmp_path):
    def make(form="a list of binaries", names=tuple(ROWS)):
        columns = {
            "conversations": [json.dumps(ROWS[name][0], ensure_ascii=False) for name in names],
            "image_bytes": [FORMS[form](ROWS[name][1]) for name in names],
            "image_names": ["0.jpg"] * len(names),
        }
        pq.write_table(pa.table(columns), tmp_path / "sft_i2t.parquet", row_group_size=4)
        return tmp_path / "sft_i2t.parquet"

    return make


@pytest.fixture(scope="module")
def thinking(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(thinking_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def dataset(path, tokenizer) -> RowDataset:
    return RowDataset(open_rows(path), PromptEncoder(tokenizer, PATCHES), SIZE, 400, resize_mode="squeeze")


def texts(rows: RowDataset, names=tuple(ROWS)) -> dict[str, str]:
    """The text of each usable row, with its placeholders."""
    read = {name: rows.text(index) for index, name in enumerate(names)}
    backend = rows.encoder.tokenizer.backend
    return {
        name: backend.decode(row.tokens.input_ids, skip_special_tokens=False)
        for name, row in read.items()
        if not isinstance(row, BrokenRow)
    }


def test_rows_of_2026_in_their_own_layout(write, thinking):
    rows = dataset(write(), thinking)
    text = texts(rows)
    assert set(ROWS) - set(text) == UNREADABLE
    pads = "<|image_pad|>" * PATCHES
    assert text["image"] == f"<|im_start|>user\n{pads}\nWhat?<|im_end|>\n<|im_start|>assistant\nA cup.<|im_end|>\n"
    assert text["two images that touch"].count("<|image_pad|>") == 2 * PATCHES
    assert "<|image_pad|>" not in text["text with a black picture"]
    for name in ("reasoning in the content", "reasoning in a field"):
        assert "assistant\n<think>\none more\n</think>\n\n2<|im_end|>" in text[name]
    assert "assistant\n2<|im_end|>" in text["an empty block"]
    assert '<tool_call>\n{"name": "count", "arguments": {"what": "cups"}}\n</tool_call>' in text["tools"]
    assert "user\n<tool_response>\n3\n</tool_response>" in text["tools"]
    assert '<tools>\n{"name": "count"}\n</tools>' in text["tools"]
    assert "What is <think>?" in text["tags in a question"]
    assert text["own system"].startswith("<|im_start|>system\nBe terse.<|im_end|>")


def test_rows_of_2026_in_the_layout_of_2025(write, demo_tokenizer):
    rows = dataset(write(), demo_tokenizer)
    text = texts(rows)
    assert set(ROWS) - set(text) == UNREADABLE | {"tools"}, "that layout has no tools"
    assert text["image"].startswith("<|im_start|>system\nYou are a helpful assistant<|im_end|>\n")
    assert "@" * 2 * PATCHES in text["two images that touch"]
    assert "<think>\none more\n</think>\n\n2" in text["reasoning in the content"], "as the row has it"


def test_old_rows_in_the_new_layout(tmp_path, thinking):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(RED)
    row = {"conversations": row_of("<image>\nWhat?", "A cup."), "image": "a.jpg"}
    (tmp_path / "sft_data.jsonl").write_text(json.dumps(row) + "\n")
    rows = RowDataset(
        open_rows(tmp_path / "sft_data.jsonl", tmp_path / "images"), PromptEncoder(thinking, PATCHES), SIZE, 400
    )
    text = texts(rows, ("only",))["only"]
    pads = "<|image_pad|>" * PATCHES
    assert text == f"<|im_start|>user\n{pads}\nWhat?<|im_end|>\n<|im_start|>assistant\nA cup.<|im_end|>\n"


def batches_of(rows: RowDataset) -> list[Batch]:
    return list(load_batches(BatchPlan(rows, 4, 0), workers=0))


def test_batches_have_the_images_of_marks_and_report_all_else(write, thinking):
    batches = batches_of(dataset(write(), thinking))
    assert sum(len(batch) for batch in batches) == len(ROWS) - len(BROKEN)
    assert sum(len(batch.broken) for batch in batches) == len(BROKEN)
    assert sum(batch.text_rows for batch in batches) == 1
    images = sum(0 if batch.pixel_values is None else len(batch.pixel_values) for batch in batches)
    marks = sum(int(batch.image_mask.sum()) for batch in batches) // PATCHES
    assert images == marks == 10


def test_one_binary_and_a_list_of_one_are_the_same(write, thinking):
    names = tuple(name for name, (_, pictures) in ROWS.items() if len(pictures) == 1 and name not in BROKEN)
    single, lists = (texts(dataset(write(form, names), thinking), names) for form in FORMS)
    assert single == lists
    assert len(single) == len(names)


def test_a_converted_file_has_the_same_rows(write, thinking, tmp_path):
    names = tuple(name for name in ROWS if name not in BROKEN)
    path = write(names=names)
    convert(open_rows(path), tmp_path / "copy.jsonl", False, lambda done, total: None)
    rows = RowDataset(
        open_rows(tmp_path / "copy.jsonl", tmp_path / "copy_images.zip"), PromptEncoder(thinking, PATCHES), SIZE, 400
    )
    assert texts(rows, names) == texts(dataset(path, thinking), names)


def test_check_counts_text_rows_and_names_broken_ones(write, thinking):
    report = checking.check(dataset(write(), thinking), 1)
    summary = checking.summary(report, 0.01)
    assert summary["text_rows"]["count"] == 1
    assert summary["usable"] == len(ROWS) - len(BROKEN)
    problems = {problem.row for problem in report.problems() if not problem.kind.startswith("repeated")}
    assert {list(ROWS)[number - 1] for number in problems} >= BROKEN
