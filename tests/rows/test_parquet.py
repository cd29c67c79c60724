"""Rows of parquet: every form that people write, damage, and an order that reads each row group once."""

from __future__ import annotations

import json
import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_v.core.data.dataset import BrokenRow, RowDataset
from minimind_v.core.data.loader import BatchPlan, load_batches
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows import parquet
from minimind_v.core.rows.parquet import ParquetRows
from minimind_v.core.rows.stores import open_rows
from tests.rows.made import PATCHES, SIZE, picture, pixels_of, shade


def talk(number, marks=1):
    return [
        {"role": "user", "content": "<image>" * marks + "What?"},
        {"role": "assistant", "content": f"Number {number}."},
    ]


def write(path, columns, group=7):
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def as_text(conversations):
    return [json.dumps(conversation) for conversation in conversations]


COUNT = 30
TALKS = [talk(n) for n in range(COUNT)]
PICTURES = [picture(n) for n in range(COUNT)]
FORMS = {
    "text and bytes": {"conversations": as_text(TALKS), "image_bytes": PICTURES},
    "text and lists": {"conversations": as_text(TALKS), "image_bytes": [[cell] for cell in PICTURES]},
    "records and bytes": {"conversations": TALKS, "image_bytes": PICTURES},
    "large binary": {"conversations": as_text(TALKS), "image_bytes": pa.array(PICTURES, pa.large_binary())},
    "of datasets": {"messages": TALKS, "image": [{"bytes": cell, "path": None} for cell in PICTURES]},
    "of datasets, lists": {"messages": TALKS, "images": [[{"bytes": cell, "path": "x"}] for cell in PICTURES]},
    "from and value": {
        "conversations": [
            [{"from": "human", "value": cell[0]["content"]}, {"from": "gpt", "value": cell[1]["content"]}]
            for cell in TALKS
        ],
        "image_bytes": PICTURES,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, form):
    rows = open_rows(write(tmp_path / "rows.parquet", FORMS[form]))
    assert len(rows) == COUNT
    assert rows.pictures is None
    for index in np.random.default_rng(0).permutation(COUNT):
        row = rows.row(int(index))
        assert row.conversations == TALKS[index]
        assert row.images == ["image 1"]
        assert row.extra == {}
        assert rows.picture(int(index), 0, row.images[0]) == PICTURES[index]
        assert rows.location(int(index)) == f"{tmp_path / 'rows.parquet'}:{index + 1}"


def test_names_and_other_columns_are_carried(tmp_path):
    columns = FORMS["text and bytes"] | {"image": [f"{n}.jpg" for n in range(COUNT)], "id": list(range(COUNT))}
    row = open_rows(write(tmp_path / "rows.parquet", columns)).row(3)
    assert row.images == ["3.jpg"]
    assert row.extra == {"id": 3}
    packed = FORMS["text and bytes"] | {"extra": ['{"id":"x"}'] * COUNT}
    assert open_rows(write(tmp_path / "packed.parquet", packed)).row(3).extra == {"id": "x"}


def test_names_alone_are_found_in_a_folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for n in range(COUNT):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(picture(n))
    path = write(
        tmp_path / "rows.parquet", {"conversations": as_text(TALKS), "image": [f"{n}.png" for n in range(COUNT)]}
    )
    rows = open_rows(path, tmp_path / "pictures")
    assert rows.pictures == tmp_path / "pictures"
    assert rows.picture(4, 0, rows.row(4).images[0]) == picture(4)
    with pytest.raises(RowError, match="--images"):
        open_rows(path).picture(4, 0, "4.png")


def test_shards_of_a_folder_are_one_set_in_the_order_of_their_names(tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    for shard, (begin, end) in enumerate(((0, 12), (12, 13), (13, 30))):
        chosen = {name: column[begin:end] for name, column in FORMS["text and bytes"].items()}
        write(tmp_path / "set" / "data" / f"train-{shard:05d}.parquet", chosen)
    rows = open_rows(tmp_path / "set")
    assert [rows.row(n).conversations for n in range(len(rows))] == TALKS
    assert rows.location(12) == f"{tmp_path / 'set' / 'data' / 'train-00001.parquet'}:1"
    assert rows.location(29).endswith("train-00002.parquet:17")
    assert sorted(rows.shuffled(np.random.default_rng(1))) == list(range(COUNT))
    write(tmp_path / "set" / "odd.parquet", {"conversations": ["[]"]})
    with pytest.raises(DataError, match="its columns differ"):
        open_rows(tmp_path / "set")


# --- rows that are broken ---------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(demo_tokenizer):
    return lambda path: RowDataset(open_rows(path), PromptEncoder(demo_tokenizer, PATCHES), SIZE, 100)


@pytest.mark.parametrize(
    ("conversations", "cell", "kind"),
    [
        ("{", [picture(1)], "json"),
        ("[" * 100_000, [picture(1)], "json"),
        (None, [picture(1)], "conversations"),
        ("3", [picture(1)], "conversations"),
        (json.dumps(talk(1)), [], "placeholders"),
        (json.dumps(talk(1)), None, "placeholders"),
        (json.dumps(talk(1)), [None], "placeholders"),
        (json.dumps(talk(1)), [b""], "placeholders"),
        (json.dumps(talk(1)), [picture(1), picture(2)], "placeholders"),
        (json.dumps(talk(1, 2)), [picture(1)], "placeholders"),
        (json.dumps(talk(1)), [b"<html>"], "image broken"),
        (json.dumps(talk(1)), [picture(1)[:-30]], "image broken"),
    ],
)
def test_a_broken_row_is_named_and_its_neighbours_are_whole(tmp_path, dataset, conversations, cell, kind):
    whole = json.dumps(talk(5))
    cells = pa.array([[picture(5)], cell, [picture(5)]], pa.list_(pa.binary()))
    path = write(tmp_path / "rows.parquet", {"conversations": [whole, conversations, whole], "image_bytes": cells})
    rows = dataset(path)
    results = [item if isinstance(item := rows.text(n), BrokenRow) else rows.load(item) for n in range(3)]
    assert isinstance(results[1], BrokenRow)
    assert (results[1].kind, results[1].location) == (kind, f"{path}:2")
    for index in (0, 2):
        assert pixels_of(results[index])[0, :, 0, 0].tolist() == shade(5)


def test_a_row_without_pictures_among_others(tmp_path, dataset):
    cells = pa.array([picture(5), None], pa.binary())
    rows = dataset(
        write(tmp_path / "rows.parquet", {"conversations": as_text([talk(1), talk(2, 0)]), "image_bytes": cells})
    )
    assert rows.load(rows.text(1)).images == []
    assert pixels_of(rows.load(rows.text(0))).shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!doctype html><html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"", "not a parquet file"),
        (b"PAR1" + bytes(100) + b"PAR1", "not a parquet file"),
    ],
)
def test_what_is_no_parquet_is_refused(tmp_path, data, message):
    path = tmp_path / "rows.parquet"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_rows(path)


def test_what_broke_off_or_has_no_rows_is_refused(tmp_path):
    path = write(tmp_path / "rows.parquet", FORMS["text and bytes"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a parquet file"):
        open_rows(path)
    with pytest.raises(DataError, match="no column `conversations`"):
        open_rows(write(tmp_path / "other.parquet", {"text": ["a"]}))
    with pytest.raises(DataError, match="no rows"):
        open_rows(write(tmp_path / "empty.parquet", {"conversations": pa.array([], pa.string())}))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="not a data file: it is a folder without rows"):
        open_rows(tmp_path / "folder")


def test_damage_within_the_file_is_the_rows_trouble(tmp_path):
    path = write(tmp_path / "rows.parquet", FORMS["text and bytes"])
    data = bytearray(path.read_bytes())
    data[4:600] = bytes(596)
    path.write_bytes(data)
    rows, wrong = open_rows(path), 0
    for index in range(len(rows)):
        try:
            whole = rows.row(index).conversations == TALKS[index]
            wrong += not whole or rows.picture(index, 0, "image 1") != PICTURES[index]
        except RowError as error:
            wrong += "\n" not in str(error)
    assert 0 < wrong < len(rows)


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """The pieces that are read, each time that one is: columns and number."""
    read, original = [], parquet.Pieces._read

    def count(pieces, number):
        read.append((*pieces.columns, number))
        return original(pieces, number)

    monkeypatch.setattr(parquet.Pieces, "_read", count)
    return read


def many(path, count=3000, group=100):
    cells = {
        "conversations": as_text([talk(n) for n in range(count)]),
        "image_bytes": [picture(n % 50) for n in range(count)],
    }
    return write(path, cells, group)


def test_a_shuffled_epoch_reads_each_row_group_once(tmp_path, counted, monkeypatch):
    rows = ParquetRows(many(tmp_path / "rows.parquet"))
    size = int(rows._data.sizes.sum())
    monkeypatch.setattr(parquet, "MIXED_PICTURES", size // 6)
    rows._data.kept, rows._text.kept = size // 5, int(rows._text.sizes.sum()) // 5
    order = rows.shuffled(np.random.default_rng(0))
    assert sorted(order) == list(range(3000))
    for index in order:
        rows.picture(int(index), 0, rows.row(int(index)).images[0])
    assert len(counted) == len(set(counted)) == 60
    assert (np.diff(order // 100) != 0).mean() > 0.5, "neighbours come from several groups"
    other = rows.shuffled(np.random.default_rng(1))
    assert (order == other).mean() < 0.05


def test_a_group_that_is_too_large_is_read_in_parts_going_on(tmp_path, counted):
    path = many(tmp_path / "rows.parquet", group=3000)
    rows = ParquetRows(path)
    size = int(rows._data.sizes.sum())
    small = parquet.Pieces([path], [pq.read_metadata(path)], ["image_bytes"], size // 4)
    assert len(small.groups) == 33
    assert [small.row(n)["image_bytes"] == picture(n % 50) for n in range(3000)] == [True] * 3000
    assert len(counted) == 33
    assert len(small._kept) < 20
    for index in (2999, 0, 1500, 10, 2998):  # backwards too
        assert small.row(index)["image_bytes"] == picture(index % 50)
    assert sorted(small.shuffled(np.random.default_rng(0), 500)) == list(range(3000))


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_parquet_are_those_of_the_seed(tmp_path, dataset, workers):
    plan = BatchPlan(dataset(many(tmp_path / "rows.parquet", 700, 64)), 4, 0, seed=3)
    shown = []
    for batch in load_batches(plan, workers):
        for location, pixels in zip(batch.locations, batch.pixel_values, strict=True):
            number = int(location.rpartition(":")[2]) - 1
            assert pixels[:, 0, 0].tolist() == shade(number % 50)
            shown.append(number)
    assert sorted(shown) == list(range(700))
    again = BatchPlan(plan.dataset, 4, 0, seed=3)
    locations = [location for k in range(len(again)) for batch in again[k] for location in batch.locations]
    assert shown == [int(location.rpartition(":")[2]) - 1 for location in locations]


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_for_themselves(tmp_path, method):
    rows = open_rows(many(tmp_path / "rows.parquet", 300))
    rows.picture(5, 0, "image 1")
    assert len(pickle.dumps(rows)) < 20_000
    with multiprocessing.get_context(method).Pool(2) as pool:
        pictures = pool.starmap_async(_picture, [(rows, n) for n in range(0, 300, 10)]).get(timeout=120)
        pool.close()
        pool.join()  # a signal may come before a new process heeds it
    assert pictures == [picture(n % 50) for n in range(0, 300, 10)]


def _picture(rows, index):
    return rows.picture(index, 0, rows.row(index).images[0])


def test_names_count_before_bytes_in_another_column_which_are_not_copied(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(1))
    columns = {"conversations": as_text([talk(1)]), "image": ["a.png"], "png": [picture(2)], "extra": ['{"k": 1}']}
    rows = open_rows(write(tmp_path / "rows.parquet", columns), folder)
    assert rows.row(0).images == ["a.png"]
    assert rows.row(0).extra == {"k": 1}
    assert rows.picture(0, 0, "a.png") == picture(1)


@pytest.mark.parametrize("extra", ["[" * 100_000, "9" * 10_000, "not JSON"])
def test_a_field_extra_that_is_no_object_is_carried_along_as_it_is(tmp_path, extra):
    path = write(tmp_path / "rows.parquet", {"conversations": as_text(TALKS[:1]), "extra": [extra]})
    assert ParquetRows(path).row(0).extra == {"extra": extra}
