"""Pictures in a folder with metadata beside them, and folders that hold no rows."""

from __future__ import annotations

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_v.core.config.load import images_beside
from minimind_v.core.errors import DataError, RowError, UsageError
from minimind_v.core.rows.stores import open_rows
from tests.rows.made import picture


def write_metadata(folder, kind, rows):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        lines = [",".join(rows[0]), *(",".join(f'"{cell}"' for cell in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def pictures(folder, *numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(picture(number))


KINDS = ("jsonl", "csv", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_stands_beside_its_pictures(tmp_path, kind):
    pictures(tmp_path / "set" / "deep", 1, 2)
    rows = [{"file_name": f"deep/{n}.png", "text": f"number {n}", "more": "x"} for n in (1, 2)]
    path = write_metadata(tmp_path / "set", kind, rows)
    store = pickle.loads(pickle.dumps(open_rows(tmp_path / "set")))
    assert [store.row(n).images for n in range(2)] == [["deep/1.png"], ["deep/2.png"]]
    assert store.row(1).conversations[-1] == {"role": "assistant", "content": "number 2"}
    assert store.row(1).extra == {"more": "x"}
    assert store.picture(1, 0, "deep/2.png") == picture(2)
    assert store.pictures == tmp_path / "set"
    assert store.location(1).startswith(f"{path}:")
    itself = open_rows(path, images_beside(path))
    assert itself.picture(1, 0, "deep/2.png") == picture(2)


@pytest.mark.parametrize("kind", KINDS)
def test_sub_folders_are_splits(tmp_path, kind):
    for n, split in enumerate(("train/a", "train/b", "validation", ".hidden")):
        pictures(tmp_path / split, n)
        write_metadata(tmp_path / split, kind, [{"file_name": f"{n}.png", "text": f"number {n}"}])
    messages = []
    rows = open_rows(tmp_path, say=messages.append)
    assert [rows.picture(n, 0, rows.row(n).images[0]) for n in range(len(rows))] == [picture(0), picture(1)]
    assert [rows.location(n).rpartition(":")[0] for n in range(2)] == [
        str(tmp_path / "train" / name / f"metadata.{kind}") for name in "ab"
    ]
    assert sorted(rows.shuffled(__import__("numpy").random.default_rng(0)).tolist()) == [0, 1]
    assert (rows.split, rows.pictures) == ("train", None)
    assert "not validation (1 file)" in messages[0]
    held = open_rows(tmp_path, split="val")
    assert held.picture(0, 0, "2.png") == picture(2)
    assert held.pictures == tmp_path / "validation"
    with pytest.raises(UsageError, match="--split test"):
        open_rows(tmp_path, split="test")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_of_several_names(tmp_path, kind):
    pictures(tmp_path, 1, 2, 3)
    talk = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "Yes."}]
    write_metadata(tmp_path, kind, [{"images_file_names": ["1.png", "2.png"], "messages": talk}])
    rows = open_rows(tmp_path)
    assert rows.row(0).images == ["1.png", "2.png"]
    write_metadata(tmp_path, kind, [{"before_file_name": "3.png", "after_file_name": "1.png", "messages": talk}])
    rows = open_rows(tmp_path)
    assert rows.row(0).images == ["3.png", "1.png"]
    assert rows.row(0).extra == {}
    write_metadata(tmp_path, kind, [{"image_file_name": "2.png", "text": "a dog"}])
    rows = open_rows(tmp_path)
    assert rows.picture(0, 0, *rows.row(0).images) == picture(2)
    assert rows.row(0).conversations[-1]["content"] == "a dog"


def test_a_table_called_metadata_that_names_no_files_is_one_of_rows(tmp_path):
    talk = json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    write_metadata(tmp_path, "parquet", [{"conversations": talk}])
    assert open_rows(tmp_path).files == [tmp_path / "metadata.parquet"]


def test_a_row_whose_picture_does_not_exist_is_broken(tmp_path):
    write_metadata(tmp_path, "csv", [{"file_name": "1.png", "text": "x"}, {"file_name": "../1.png", "text": "x"}])
    rows = open_rows(tmp_path)
    for n in range(2):
        with pytest.raises(RowError):
            rows.picture(n, 0, rows.row(n).images[0])


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_notes_called_metadata_beside_shards_are_no_rows(tmp_path, kind):
    write_metadata(tmp_path, kind, [{"version": "1", "license": "x"}])
    talk = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
    pq.write_table(pa.Table.from_pylist([{"conversations": talk}] * 3), tmp_path / "a.parquet")
    assert len(open_rows(tmp_path)) == 3


def test_bytes_in_metadata_that_are_not_read_are_named(tmp_path):
    pictures(tmp_path, 1)
    rows = [{"file_name": "1.png", "text": "x", "mask": b"mask"}]
    write_metadata(tmp_path, "parquet", rows)
    messages = []
    open_rows(tmp_path, say=messages.append)
    assert messages == [f"{tmp_path / 'metadata.parquet'}: the bytes in mask are ignored and not copied"]


def test_two_files_of_metadata_are_one_too_many(tmp_path):
    for kind in ("csv", "jsonl"):
        write_metadata(tmp_path, kind, [{"file_name": "1.png", "text": "x"}])
    with pytest.raises(DataError, match=r"both metadata\.jsonl and metadata\.csv"):
        open_rows(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/1.png"], "add a metadata.csv with the columns file_name and text"),
        (["a.jsonl", "b.jsonl", "1.png"], "give one file, such as .*a.jsonl"),
        (["notes.txt"], "a folder without rows"),
        ([], "a folder without rows"),
    ],
)
def test_a_folder_without_rows_is_named_with_what_would_be_read(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    with pytest.raises(DataError, match=message):
        open_rows(tmp_path)
