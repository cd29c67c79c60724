"""LLaVA's JSON, folders that `datasets` has saved, and the index that is kept beside large files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import zipfile

import numpy as np
import pytest

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows import index, json_layout, pictures
from minimind_v.core.rows import jsonl as stores
from minimind_v.core.rows.index import Index
from minimind_v.core.rows.stores import open_rows
from tests.rows.made import picture

LLAVA = [
    {
        "id": "0",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\n图?"}, {"from": "gpt", "value": "狗🐶"}],
    },
    {"id": "1", "conversations": [{"from": "system", "value": "Short."}, {"from": "human", "value": "Hi"}]},
    {
        "id": "2",
        "image": ["a.png", "b.png"],
        "conversations": [{"from": "alien", "value": ']},{"['}],
        "n": {"a": [1, 2]},
    },
]


# --- LLaVA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64, 2**22])
def test_an_array_of_rows(tmp_path, monkeypatch, indent, ascii_, chunk):
    monkeypatch.setattr(json_layout, "CHUNK", chunk)
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(LLAVA, indent=indent, ensure_ascii=ascii_), encoding="utf-8")
    (tmp_path / "a.png").write_bytes(picture(1))
    rows = open_rows(path, tmp_path)
    read = [rows.row(n) for n in range(len(rows))]
    assert [row.images for row in read] == [["a.png"], [], ["a.png", "b.png"]]
    assert read[0].conversations == [
        {"role": "user", "content": "<image>\n图?"},
        {"role": "assistant", "content": "狗🐶"},
    ]
    assert [message["role"] for message in read[1].conversations] == ["system", "user"]
    assert read[2].conversations[0] == {"role": "alien", "content": ']},{"['}
    assert read[2].extra == {"id": "2", "n": {"a": [1, 2]}}
    assert rows.location(2) == f"{path}:3"
    assert rows.picture(0, 0, "a.png") == picture(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":1}', "does not start with"),
        ('[{"a":1}', "begins at byte"),
        ('[{"a":1},{"b"', "begins at byte 9"),
        ('[{"a":1} nonsense]', "begins at byte 9"),
        ('[{"a":1}] more', "extra data after its end"),
        ("[12", "begins at byte 1"),
        ("[" * 100_000, "not a JSON array"),
        ("[]", "no rows"),
        ("<html>", "HTML page"),
        ("", "no rows"),
    ],
)
def test_what_is_no_array_of_rows_is_refused(tmp_path, text, message):
    (tmp_path / "llava.json").write_text(text)
    with pytest.raises(DataError, match=message):
        open_rows(tmp_path / "llava.json")


def test_an_element_that_is_no_row_is_its_own_trouble(tmp_path):
    path = tmp_path / "llava.json"
    path.write_text(json.dumps([LLAVA[0], 3, "text", None, {"image": 5}, LLAVA[0]]))
    rows = open_rows(path)
    for number in (1, 2, 3, 4):
        with pytest.raises(RowError):
            rows.row(number)
    assert rows.row(5).images == ["a.png"]


def test_a_large_array_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "CHUNK", 1000)
    rng, path = random.Random(0), tmp_path / "llava.json"
    written = [{"conversations": [{"from": "human", "value": "é🐶" * rng.randrange(400)}], "n": n} for n in range(300)]
    path.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
    rows = open_rows(path)
    assert [rows.row(n).extra["n"] for n in range(300)] == list(range(300))
    assert rows.row(7).conversations[0]["content"] == written[7]["conversations"][0]["value"]


# --- datasets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_a_saved_folder_of_datasets(tmp_path, several):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    talks = [
        [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": f"Number {n}."}]
        for n in range(9)
    ]
    cells = [{"bytes": picture(n), "path": None} for n in range(9)]
    kind = datasets.Image()
    columns = {"messages": talks, "id": list(range(9))}
    columns |= {"images": [[cell] for cell in cells]} if several else {"image": cells}
    dataset = datasets.Dataset.from_dict(columns)
    dataset = dataset.cast_column("images", datasets.List(kind)) if several else dataset.cast_column("image", kind)
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "set")
    for path in (tmp_path / "set", tmp_path / "set" / "train"):
        rows = pickle.loads(pickle.dumps(open_rows(path)))
        assert len(rows) == 9
        row = rows.row(4)
        assert (row.conversations, row.images, row.extra) == (talks[4], ["image 1"], {"id": 4})
        assert rows.picture(4, 0, "image 1") == picture(4), "the bytes as they were, not decoded and encoded again"
        assert sorted(rows.shuffled(np.random.default_rng(0))) == list(range(9))
    (tmp_path / "set" / "dataset_dict.json").write_text("{}")
    (tmp_path / "set" / "train" / "state.json").write_text("{")
    with pytest.raises(DataError):
        open_rows(tmp_path / "set" / "train")


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Rows and their zip, both worth an index; every call opens them, and tells whether it had to look through them."""
    monkeypatch.setattr(index, "WORTH_KEEPING", 10)
    searched = []
    for kind in (stores.JsonlRows, pictures.ZipPictures):
        name = "_find_rows" if kind is stores.JsonlRows else "_find_entries"
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, method=original: searched.append(self.path.suffix) or method(self))
    data, images = tmp_path / "rows.jsonl", tmp_path / "pictures.zip"

    def make(count):
        data.write_text("".join(f'{{"n": {n}, "image": "{n}.jpg"}}\n\n' for n in range(count)))
        with zipfile.ZipFile(images, "w") as archive:
            for n in range(count):
                archive.writestr(f"d/{n}.jpg", b"%d" % n)

    def check(count):
        searched.clear()
        rows = open_rows(data, images)
        assert len(rows) == count
        for n in range(count):
            assert rows.row(n).extra["n"] == n
            assert rows.number(n) == 2 * n + 1
            assert rows.picture(n, 0, f"{n}.jpg") == b"%d" % n
        assert len(pickle.dumps(rows)) < 2000
        again = pickle.loads(pickle.dumps(rows))
        assert again.picture(3, 0, again.row(3).images[0]) == b"3"
        return searched[:]

    return make, check, tmp_path


def test_an_index_is_kept_and_made_again_when_the_file_changed(large):
    make, check, folder = large
    make(50)
    assert check(50) == [".jsonl", ".zip"]
    assert check(50) == []
    make(60)
    assert check(60) == [".jsonl", ".zip"]
    os.utime(folder / "pictures.zip", (1, 1))
    assert check(60) == [".zip"]
    assert check(60) == []
    assert sorted(path.name for path in folder.iterdir()) == [
        ".pictures.zip.index.npy", ".rows.jsonl.index.npy", "pictures.zip", "rows.jsonl"
    ]  # fmt: skip


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:100], lambda b: b[:-8], lambda b: b"x" * len(b)])
def test_a_damaged_index_is_made_again(large, damage):
    make, check, folder = large
    make(50)
    check(50)
    for kept in folder.glob(".*.npy"):
        kept.write_bytes(damage(kept.read_bytes()))
    assert check(50) == [".jsonl", ".zip"]
    assert check(50) == []


def test_no_mutation_of_an_index_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "WORTH_KEEPING", 10)
    (tmp_path / "rows").write_bytes(b"rows")
    numbers = np.random.default_rng(0).integers(0, 2**40, (2, 30)).astype(np.uint64)
    kept, rng, built = tmp_path / ".rows.index.npy", random.Random(0), []

    def open_index():
        return Index(tmp_path / "rows", "numbers", lambda: built.append(1) or numbers)

    open_index()
    whole = kept.read_bytes()
    for number in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if number % 10 == 0:
            del data[rng.randrange(len(data)) :]
        if number % 10 == 1:
            data[(at := rng.randrange(len(data))) : at] = rng.randbytes(8)
        kept.write_bytes(data)
        assert np.array_equal(open_index().array, numbers)
    built.clear()
    assert np.array_equal(open_index().array, numbers)
    assert not built, "it is whole again"


def test_a_process_that_finds_its_index_changed_says_so(large):
    make, _, folder = large
    make(20)
    sent = pickle.dumps(open_rows(folder / "rows.jsonl"))
    kept = folder / ".rows.jsonl.index.npy"
    kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="changed while it was in use"):
        pickle.loads(sent)


def test_an_index_of_another_kind_or_another_reader_is_made_again(large):
    """The same file may have been named in another place, or was read by another version."""
    make, check, folder = large
    make(50)
    check(50)
    for kept, reader in ((".pictures.zip.index.npy", "JSONL rows"), (".rows.jsonl.index.npy", "zip members")):
        (folder / kept).unlink()
        path = folder / kept.removesuffix(".index.npy")[1:]
        Index(path, reader, lambda: np.arange(200, dtype=np.uint64).reshape(2, 100))
        assert (folder / kept).is_file()
    assert check(50) == [".jsonl", ".zip"]
    assert check(50) == []
    for kept in folder.glob(".*.npy"):  # as before an index told its kind
        index = np.load(kept)
        np.save(kept, np.delete(index, 1, axis=1))
    assert check(50) == [".jsonl", ".zip"]


def test_versions_of_another_layout_do_not_take_an_index_for_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "WORTH_KEEPING", 10)
    (tmp_path / "rows").write_bytes(b"rows")
    Index(tmp_path / "rows", "numbers", lambda: np.zeros((2, 30)))
    stamp = np.load(tmp_path / ".rows.index.npy")[:, :2]
    of_two_columns = np.frombuffer(hashlib.blake2b(b"numbers", digest_size=16).digest(), np.uint64)
    assert not np.array_equal(stamp[:, 1], of_two_columns)


def test_a_small_file_gets_no_index(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a":1}\n')
    open_rows(tmp_path / "rows.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
