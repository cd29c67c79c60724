"""How rows stand in a file of JSON is found by its content, in bounded memory, and one broken row is one row."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows import json_layout
from minimind_v.core.rows import jsonl as stores
from minimind_v.core.rows.json_layout import ARRAY, LINES, OBJECTS, OTHER, find_layout
from minimind_v.core.rows.stores import open_rows

ROW = {"conversations": [{"role": "user", "content": '图 ]} " {['}, {"role": "assistant", "content": "a\\"}], "id": 1}
LINE = json.dumps(ROW, ensure_ascii=False)
PRETTY = json.dumps(ROW, indent=2)


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"{LINE}\n{LINE}\n", LINES),
        (f"\n\n  {LINE}\n{LINE}", LINES),
        (f"[{LINE},\n{LINE}]", ARRAY),
        (f"\n [\n{PRETTY},\n{PRETTY}\n]\n", ARRAY),
        (f"{PRETTY}\n{PRETTY}\n", OBJECTS),
        (f"{PRETTY}{PRETTY}", OBJECTS),
        (f'{{"data": [{LINE}, {LINE}]}}', ARRAY),
        (f'{{\n "version": "1",\n "rows": [{PRETTY}, {LINE}],\n "n": {{"a": [1]}}\n}}\n', ARRAY),
    ],
)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_rows_are_found_however_they_stand(tmp_path, monkeypatch, ending, text, kind, bom):
    path = tmp_path / f"rows.{ending}"
    path.write_text(bom + text, encoding="utf-8")
    assert find_layout(path).kind == kind
    for chunk in (7, 2**22):
        monkeypatch.setattr(json_layout, "CHUNK", chunk)
        rows = open_rows(path)
        assert [(rows.row(n).conversations, rows.row(n).extra) for n in range(len(rows))] == [
            (ROW["conversations"], {"id": 1})
        ] * 2


def test_a_list_of_rows_that_is_larger_than_the_beginning_is_found(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"info": {"by": "x"}, "data": [ROW] * 60_000, "end": [1]}))
    assert path.stat().st_size > json_layout.CHUNK
    rows = open_rows(path)
    assert len(rows) == 60_000
    assert rows.row(59_999).conversations == ROW["conversations"]


BROKEN = {
    "a long number": '{"a": ' + "9" * 5000 + "}",
    "deep": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "not JSON inside": "{'a': 1}",
    "a bad escape": '{"a": "\\x"}',
    "NUL": '{"a": "\0"}',
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("indent", [None, 1])
def test_one_broken_element_of_an_array_is_one_broken_row(tmp_path, broken, indent):
    row = json.dumps(ROW, indent=indent)
    (tmp_path / "rows.json").write_text(f"[{row}, {BROKEN[broken]}, {row}]")
    (tmp_path / "pretty.json").write_text(f"{PRETTY}\n{BROKEN[broken]}\n{PRETTY}")
    for name in ("rows.json", "pretty.json"):
        rows = open_rows(tmp_path / name)
        assert len(rows) == 3
        with pytest.raises(RowError) as caught:
            rows.row(1)
        assert caught.value.kind == "json"
        assert [rows.row(n).conversations for n in (0, 2)] == [ROW["conversations"]] * 2


def test_bad_utf_8_in_an_array_is_one_broken_row(tmp_path):
    (tmp_path / "rows.json").write_bytes(b"[" + LINE.encode() + b', {"a": "\xff"}, ' + LINE.encode() + b"]")
    rows = open_rows(tmp_path / "rows.json")
    with pytest.raises(RowError, match="utf-8"):
        rows.row(1)
    assert rows.row(2).extra == {"id": 1}


@pytest.mark.parametrize("tail", ["", "}", ', "x": 1', ", nonsense}", '}{"a": 1}'])
def test_an_object_around_the_rows_that_does_not_end_is_refused(tmp_path, tail):
    path = tmp_path / "rows.json"
    path.write_text(f'{{"data": [{", ".join([LINE] * 60_000)}]{tail}')
    if tail == "}":
        assert len(open_rows(path)) == 60_000
    else:
        with pytest.raises(DataError, match="the object around `data`"):
            open_rows(path)


def test_objects_that_are_no_rows_are_reported_as_such(tmp_path):
    (tmp_path / "a.json").write_text('{"info": 1, "licences": [{"id": 1}]}')
    assert find_layout(tmp_path / "a.json").kind == OTHER
    with pytest.raises(DataError, match="info, licences, which is neither a row nor a list of rows"):
        open_rows(tmp_path / "a.json")


def test_a_row_has_a_greatest_length(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "ROW_LIMIT", 5_000_000)
    monkeypatch.setattr(json_layout, "ROW_LIMIT", 5_000_000)
    large = '{"a": "' + "x" * 20_000_000 + '"}'
    (tmp_path / "rows.jsonl").write_text(f"{LINE}\n{large}\n{LINE}\n")
    (tmp_path / "rows.json").write_text(f"[{LINE},{large},{LINE}]")
    tracemalloc.start()
    rows = open_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 3
    with pytest.raises(RowError, match="longer than 5,000,000 bytes"):
        rows.row(1)
    with pytest.raises(DataError, match="more than 5,000,000 bytes, in the element that begins at byte"):
        open_rows(tmp_path / "rows.json")
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()
    assert rows.row(2).extra == {"id": 1}


def test_a_row_of_millions_of_lists_is_refused_before_it_takes_memory(tmp_path):
    (tmp_path / "rows.jsonl").write_text(LINE + '\n{"a": [' + "{}," * 3_000_000 + "{}]}\n")
    rows = open_rows(tmp_path / "rows.jsonl")
    tracemalloc.start()
    with pytest.raises(RowError, match="lists and records in one row"):
        rows.row(1)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
