"""Train, validation and test files of one folder are told apart, and never mixed without a word."""

from __future__ import annotations

import json
from pathlib import PurePath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_v.core.errors import DataError, UsageError
from minimind_v.core.rows.splits import SCORE, split_of
from minimind_v.core.rows.stores import open_rows


def talk(text):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]


def folder_of(folder, names, **columns):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"conversations": [json.dumps(talk(name))]} | columns), path)
    return folder


def questions(rows):
    return [rows.row(n).conversations[0]["content"] for n in range(len(rows))]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00003.parquet", "train"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("test/0000.parquet", "test"),
        ("default/partial-train/0000.parquet", "train"),
        ("en/dev/part-1.parquet", "validation"),
        ("val.parquet", "validation"),
        ("valid_3.parquet", "validation"),
        ("coco_val2017.parquet", "validation"),
        ("myTestSet.parquet", "test"),
        ("training.parquet", "train"),
        ("llava.train.00.parquet", "train"),
        ("EVAL-1.parquet", "test"),
        ("held_out.parquet", "held_out"),
        ("heldout-2.parquet", "held_out"),
        ("我的训练集.parquet", "train"),
        ("test/train-like.parquet", "train"),
        ("latest.parquet", None),
        ("contest-00000-of-00002.parquet", None),
        ("pretrain_i2t.parquet", None),
        ("part-00000.parquet", None),
        ("development.parquet", None),
        ("retrained/part-0.parquet", None),
    ],
)
def test_names_that_say_a_split(path, split):
    assert split_of(PurePath(path)) == split


LAYOUTS = {
    "shards": ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation-00000-of-00001"),
    "folder of data": ("data/train-0", "data/train-1", "data/test-0", "data/valid-0"),
    "folders": ("train/0", "train/1", "test/0", "dev/0"),
    "nested": ("en/train/0", "zh/train/0", "en/test/0", "en/val/0"),
    "bare": ("rows_a", "rows_b", "rows_test", "rows_val"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_split_of_a_folder_is_read_and_said(tmp_path, layout):
    names = [f"{name}.parquet" for name in LAYOUTS[layout]]
    messages = []
    rows = open_rows(folder_of(tmp_path, names), say=messages.append)
    assert sorted(questions(rows)) == sorted(names[:2])
    assert rows.split == "train"
    (line,) = messages
    for phrase in ("the split train", "2 files", "test (1 file)", "validation (1 file)", "--split"):
        assert phrase in line
    assert questions(open_rows(tmp_path, split="test")) == names[2:3]
    assert questions(open_rows(tmp_path, split="validation")) == names[3:]
    assert questions(open_rows(tmp_path, split="val")) == names[3:]
    assert sorted(questions(open_rows(tmp_path, split="all"))) == sorted(names)
    scored = open_rows(tmp_path, say=messages.append, order=SCORE)
    assert (questions(scored), scored.split) == (names[2:3], "test")
    with pytest.raises(UsageError, match=r"--split tset: .*did you mean 'test'"):
        open_rows(tmp_path, split="tset")


def test_a_folder_whose_names_say_nothing_is_one_set(tmp_path):
    messages = []
    folder_of(tmp_path, ("b.parquet", "a.parquet", "x/part-0.parquet", ".out.parquet.parts/part-0.parquet"))
    rows = open_rows(tmp_path, say=messages.append, order=SCORE)
    assert questions(rows) == ["a.parquet", "b.parquet", "x/part-0.parquet"], "what is hidden is no shard"
    assert (rows.split, messages) == ("", [])
    with pytest.raises(UsageError, match="no file name in"):
        open_rows(tmp_path, split="test")


def test_the_only_split_is_read_and_said_unless_it_is_train(tmp_path):
    messages = []
    assert len(open_rows(folder_of(tmp_path / "a", ("train-0.parquet", "train-1.parquet")), say=messages.append)) == 2
    assert messages == []
    assert len(open_rows(folder_of(tmp_path / "b", ("dev-0.parquet", "dev-1.parquet")), say=messages.append)) == 2
    assert "only split is validation" in messages[0]


def test_of_several_splits_without_train_one_must_be_named(tmp_path):
    folder_of(tmp_path, ("dev-0.parquet", "test-0.parquet"))
    with pytest.raises(UsageError, match=r"test \(1 file\), and no train|but no train — choose one with --split"):
        open_rows(tmp_path)
    assert len(open_rows(tmp_path, order=SCORE)) == 1


def test_only_the_files_of_the_split_must_have_the_same_columns(tmp_path):
    folder_of(tmp_path, ("train-0.parquet",))
    folder_of(tmp_path, ("test-0.parquet",), question_id=[1])
    assert len(open_rows(tmp_path)) == 1
    with pytest.raises(DataError, match="its columns differ"):
        open_rows(tmp_path, split="all")


def test_a_file_has_no_splits(tmp_path):
    folder_of(tmp_path, ("test-0.parquet",))
    messages = []
    assert len(open_rows(tmp_path / "test-0.parquet", say=messages.append)) == 1
    assert messages == []
    with pytest.raises(UsageError, match="is one file"):
        open_rows(tmp_path / "test-0.parquet", split="train")


def test_splits_that_datasets_has_saved(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    split_sets = {
        name: datasets.Dataset.from_dict({"messages": [talk(name)] * rows})
        for name, rows in (("test", 2), ("train", 3), ("val", 1))
    }
    datasets.DatasetDict(split_sets).save_to_disk(tmp_path / "set")
    messages = []
    rows = open_rows(tmp_path / "set", say=messages.append)
    assert (questions(rows), rows.split) == (["train"] * 3, "train")
    assert "not test (2 rows), val (1 row)" in messages[0]
    assert rows.location(1) == f"{tmp_path / 'set' / 'train'}:2"
    assert questions(open_rows(tmp_path / "set", split="validation")) == ["val"]
    assert len(open_rows(tmp_path / "set", split="all")) == 6
    with pytest.raises(UsageError, match="--split dog"):
        open_rows(tmp_path / "set", split="dog")
    with pytest.raises(UsageError, match="only one split — leave out --split"):
        open_rows(tmp_path / "set" / "test", split="test")
    datasets.DatasetDict({"dev": split_sets["val"], "test": split_sets["test"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(UsageError, match="no train"):
        open_rows(tmp_path / "other")
