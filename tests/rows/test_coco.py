"""COCO's captions and Karpathy's: a row a caption, found once, and objects that are not these."""

from __future__ import annotations

import json
import pickle

import pytest

from minimind_v.core.errors import DataError, RowError, UsageError
from minimind_v.core.rows import coco, index, json_layout
from minimind_v.core.rows.stores import open_rows
from tests.rows.made import picture, use

PICTURES = [{"file_name": f"{n}.png", "height": 18, "id": n, "license": {"a": [1, "}]"]}} for n in range(4)]
CAPTIONS = [{"image_id": n % 4, "id": 100 + n, "caption": f"caption {n} 图🐶"} for n in range(8)]
TALK = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


def write(tmp_path, value, **options):
    path = tmp_path / "captions.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value, **options), encoding="utf-8")
    return path


def caption(rows, number):
    return rows.row(number).conversations[-1]["content"]


@pytest.mark.parametrize("order", [("info", "images", "licenses", "annotations"), ("annotations", "images")])
@pytest.mark.parametrize("options", [{}, {"indent": 2, "ensure_ascii": False}])
@pytest.mark.parametrize("chunk", [1, 7, 2**22])
def test_a_row_is_a_caption(tmp_path, monkeypatch, order, options, chunk):
    monkeypatch.setattr(coco, "CHUNK", chunk)
    monkeypatch.setattr(json_layout, "CHUNK", chunk)
    held = {"info": {"year": 2017}, "images": PICTURES, "licenses": [1, {"b": 2}], "annotations": CAPTIONS}
    (tmp_path / "3.png").write_bytes(picture(3))
    path = write(tmp_path, {key: held[key] for key in order}, **options)
    rows = pickle.loads(pickle.dumps(open_rows(path, tmp_path)))
    assert [rows.row(n).images for n in range(len(rows))] == [[f"{n % 4}.png"] for n in range(8)]
    assert [caption(rows, n) for n in range(8)] == [f"caption {n} 图🐶" for n in range(8)]
    assert rows.picture(7, 0, "3.png") == picture(3)
    assert rows.location(7) == f"{path}:8"
    assert rows.row(7).form.endswith("+ caption")
    with pytest.raises(UsageError, match="--split train"):
        open_rows(path, split="train")


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"caption": "c", "id": 1}, "without `image_id`"),
        ({"caption": "c", "image_id": 99}, "no image has the id 99"),
        ({"caption": "c", "image_id": "7"}, "several images have the id '7'"),
        ({"caption": "c", "image_id": 8}, "has no `file_name`"),
        (3, "not a JSON object"),
        ({"image_id": 1}, "conversation"),
    ],
)
def test_a_bad_annotation_is_one_broken_row(tmp_path, annotation, message):
    images = [*PICTURES, {"file_name": "a.png", "id": 7}, {"file_name": "b.png", "id": 7}, {"id": 8}, {"no": 1}, None]
    path = write(tmp_path, {"images": images, "annotations": [CAPTIONS[0], annotation, CAPTIONS[5]]})
    rows = open_rows(path)
    with pytest.raises(RowError, match=message):
        use(rows, 1)
    assert [caption(rows, n) for n in (0, 2)] == [CAPTIONS[0]["caption"], CAPTIONS[5]["caption"]]


def test_ids_are_the_same_in_any_writing(tmp_path):
    images = [{"id": "a-1", "file_name": "a.png"}, {"id": 5, "file_name": "b.png"}, {"id": 5, "file_name": "b.png"}]
    annotations = [{"image_id": key, "caption": "c"} for key in ("a-1", "5", 5.0, 5)]
    rows = open_rows(write(tmp_path, {"images": images, "annotations": annotations}))
    assert [rows.row(n).images for n in range(4)] == [["a.png"], ["b.png"], ["b.png"], ["b.png"]]


def karpathy():
    splits = ("train", "restval", "val", "test")
    return {
        "dataset": "coco",
        "images": [
            {
                "filepath": "val2014", "filename": f"{n}.png", "split": split, "imgid": n, "cocoid": n,
                "sentences": [{"raw": f"{split} {m}", "tokens": [split], "imgid": n} for m in range(n + 1)],
            }
            for n, split in enumerate(splits)
        ],
    }  # fmt: skip


def test_karpathy_has_splits(tmp_path):
    path, messages = write(tmp_path, karpathy()), []
    (tmp_path / "1.png").write_bytes(picture(1))
    rows = pickle.loads(pickle.dumps(open_rows(path, tmp_path, say=messages.append)))
    assert [caption(rows, n) for n in range(len(rows))] == ["train 0", "restval 0", "restval 1"]
    assert rows.row(1).images == ["val2014/1.png"]
    assert rows.picture(1, 0, "val2014/1.png") == picture(1)
    assert (rows.split, rows.location(2)) == ("train", f"{path}:3")
    assert "reading the split train (3 rows), not validation (3 rows), test (4 rows)" in messages[0]
    test = open_rows(path, split="test")
    assert (len(test), caption(test, 3), test.location(0)) == (4, "test 3", f"{path}:7")
    assert len(open_rows(path, split="all")) == 10
    with pytest.raises(UsageError, match="--split held_out"):
        open_rows(path, split="held_out")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"images": PICTURES, "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}, "no annotation has a `caption`"),
        ({"images": PICTURES, "annotations": []}, "no annotation has a `caption`"),
        ('{"images": [{"id": 1}', "not a COCO caption file"),
        ('{"images": [{"id": 1}, ' + "[" * 100_000, "not a COCO caption file"),
        ('{"images": [{"id": ' + "9" * 5000 + "}]}", "not a COCO caption file"),
        ('{"images": [{"id": 1}]} {"a"', "extra data after its end"),
        ('{"images": [{"id": 1}], nonsense', "no key at byte 24"),
    ],
)
def test_what_has_no_captions_is_named(tmp_path, value, message):
    with pytest.raises(DataError, match=message):
        open_rows(write(tmp_path, value))


def test_a_value_without_end_is_not_kept_in_memory(tmp_path):
    path = tmp_path / "captions.json"
    with path.open("w") as file:
        file.write('{"images": [{"id": 1, "file_name": "')
        for _ in range(64):
            file.write("x" * 2**20)
        file.write('"}]}')
    with pytest.raises(DataError, match="not a COCO caption file"):
        open_rows(path)


def test_rows_one_per_line_may_be_called_json(tmp_path):
    path = write(tmp_path, "\n".join([json.dumps(TALK)] * 3))
    assert len(open_rows(path)) == 3


def test_a_large_file_is_gone_through_once(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "WORTH_KEEPING", 5)
    path = write(tmp_path, {"images": PICTURES, "annotations": CAPTIONS})
    first = open_rows(path)
    monkeypatch.setattr(coco, "_elements", None)
    again = open_rows(path)
    assert [again.row(n) for n in range(8)] == [first.row(n) for n in range(8)]
