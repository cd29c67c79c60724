"""CSV and TSV: column names found, quoted cells, and every bad record on its own line."""

from __future__ import annotations

import base64
import json
import pickle
import resource
import time

import pytest

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows import tables
from minimind_v.core.rows.stores import open_rows
from tests.rows.made import picture, use


def rows_of(tmp_path, text, name="rows.csv", images=None):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_rows(path, images)


def answers(rows):
    return [rows.row(n).conversations[-1]["content"] for n in range(len(rows))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "image,caption\na.png,a dog\nb.png,a cat\n"),
        ("rows.csv", "image,caption\r\na.png,a dog\r\nb.png,a cat"),
        ("rows.csv", "\ufeffimage;caption\na.png;a dog\n\nb.png;a cat\n"),
        ("rows.csv", '\ufeff"image","caption"\n"a.png","a dog"\n"b.png","a cat"\n'),
        ("rows.csv", ",Image,Caption,\n0,a.png,a dog,\n1,b.png,a cat,\n"),
        ("rows.tsv", "image\tcaption\na.png\ta dog\nb.png\ta cat\n"),
        ("rows.csv", "image\tcaption\na.png\ta dog\nb.png\ta cat\n"),
        ("rows.csv", "caption,file_name\na dog,a.png\na cat,b.png\n"),
    ],
)
def test_columns_are_found_by_their_names(tmp_path, name, text):
    (tmp_path / "a.png").write_bytes(picture(1))
    rows = pickle.loads(pickle.dumps(rows_of(tmp_path, text, name, tmp_path)))
    assert answers(rows) == ["a dog", "a cat"]
    assert [rows.row(n).images for n in range(2)] == [["a.png"], ["b.png"]]
    assert rows.picture(0, 0, "a.png") == picture(1)
    assert rows.row(0).form.endswith("+ caption")


def test_quoted_cells_hold_line_ends_and_the_line_is_that_of_an_editor(tmp_path):
    text = 'image,caption,source\na.png,"two\nlines, ""so""",web\n\n\nb.png,é\u2028\x0b,\n'
    rows = rows_of(tmp_path, text)
    assert answers(rows) == ['two\nlines, "so"', "é\u2028\x0b"]
    assert [rows.location(n).rpartition(":")[2] for n in range(2)] == ["2", "6"]
    assert rows.row(0).extra == {"source": "web"}


def test_cells_hold_conversations_and_lists_as_json(tmp_path):
    talk = json.dumps(
        [{"from": "human", "value": "<image><image>\nWhich, [the first]?"}, {"from": "gpt", "value": "A"}]
    )
    quoted = talk.replace('"', '""')
    first, second = """"[""a, b.png"", ""b.png""]","[1, 2]\"""", """"['a.png', 'b.png']",[1"""
    text = f'conversations,images,boxes\n"{quoted}",{first}\n"{quoted}",{second}\n'
    rows = rows_of(tmp_path, text)
    assert [rows.row(n).images for n in range(2)] == [["a, b.png", "b.png"], ["a.png", "b.png"]]
    assert [rows.row(n).extra["boxes"] for n in range(2)] == [[1, 2], "[1"]
    assert rows.row(0).conversations[0] == {"role": "user", "content": "<image><image>\nWhich, [the first]?"}


def test_a_caption_in_brackets_stays_a_text(tmp_path):
    assert answers(rows_of(tmp_path, 'image,caption\na.png,[1]\nb.png,{"a":1}\n')) == ["[1]", '{"a":1}']


def test_a_picture_in_base64_stands_in_its_row(tmp_path):
    rows = rows_of(tmp_path, f"image,caption\n{base64.b64encode(picture(3)).decode()},three\n")
    (name,) = rows.row(0).images
    assert rows.picture(0, 0, name) == picture(3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("a.png", "1 cell for 2 columns"),
        ("a.png,a dog, a cat", "3 cells for 2 columns"),
        ('a.png,"a dog', "is not closed"),
        ('a.png,"a" dog', "not CSV"),
        (b"a.png,\xff\xfe dog", "not UTF-8"),
        ("a.png,", "conversation"),
    ],
)
def test_a_bad_record_is_one_broken_row(tmp_path, record, message):
    record = record if isinstance(record, bytes) else record.encode()
    rows = rows_of(tmp_path, b"image,caption\nb.png,before\n" + record + b'\nc.png,after\nd.png,"the\nlast"\n')
    assert len(rows) == 4
    assert rows.location(1).endswith("rows.csv:3")
    with pytest.raises(RowError, match=message):
        use(rows, 1)
    assert [rows.row(n).conversations[-1]["content"] for n in (0, 2, 3)] == ["before", "after", "the\nlast"]


def test_a_tsv_without_quoting_keeps_its_quotes(tmp_path):
    rows = rows_of(tmp_path, 'image\tcaption\na.png\t"Stop" it says\nb.png\t5" wide\nc.png\t"open\n', "rows.tsv")
    assert answers(rows) == ['"Stop" it says', '5" wide', '"open']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,a red circle\nb.png,a cat\n", "is a row — add a line of column names"),
        ("a red circle\n", "names a red circle, so there is no conversation"),
        ("image,label\na.png,3\n", "names image, label, so"),
        ("image,caption,caption\n", "names caption twice"),
        ("image,caption\n", "no rows"),
        ("", "names nothing"),
        ("<html>\n", "HTML page"),
        (b"image,\xc3\n", "not UTF-8"),
        (b"image,caption\ra.png,a dog\rb.png,a cat", "line"),
        ("x" * 3_000_000, "its first line is too long"),
    ],
)
def test_what_has_no_column_names_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path, text)


def test_a_line_without_end_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RECORD_LIMIT", 2**20)
    path = tmp_path / "rows.csv"
    with path.open("wb") as file:
        file.write(b"image,caption\na.png," + b"one" * 300 + b"\nb.png,")
        file.seek(600 * 2**20, 1)  # a hole: zeros that take no disk
        file.write(b'\nc.png,three\nd.png,"' + b"word " * 400_000 + b"\ne.png,five\n")
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    rows = open_rows(path)
    assert len(rows) == 5
    assert [rows.number(n) for n in range(5)] == [2, 3, 4, 5, 6]
    for n in (1, 3):
        with pytest.raises(RowError, match=r"a record of more than|not closed"):
            rows.row(n)
    assert [rows.row(n).conversations[-1]["content"] for n in (0, 2, 4)] == ["one" * 300, "three", "five"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB
    assert time.monotonic() - begin < 30
