"""Rows by line number, pictures by name: odd files, hostile names, damage, and several processes at once."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import pickle
import random
import struct
import time
import tracemalloc
import unicodedata
import zipfile

import pytest

from minimind_v.core.errors import DataError, MissingInput, RowError
from minimind_v.core.rows import jsonl as stores
from minimind_v.core.rows import row
from minimind_v.core.rows.archives import ZipPictures
from minimind_v.core.rows.jsonl import JsonlRows
from minimind_v.core.rows.pictures import FolderPictures, open_pictures
from minimind_v.core.rows.row import image_names, names_as_text
from minimind_v.core.rows.stores import open_rows

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def jsonl(tmp_path):
    """`jsonl(bytes)` is a store over a file of these bytes."""

    def write(data: bytes) -> JsonlRows:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(data)
        return JsonlRows(path)

    return write


@pytest.fixture
def zipped(tmp_path):
    """`zipped({member: bytes})` is a store over a zip of these members."""

    def write(members, compression=zipfile.ZIP_STORED) -> ZipPictures:
        path = tmp_path / "pictures.zip"
        with zipfile.ZipFile(path, "w", compression) as archive:
            for member, data in members.items() if isinstance(members, dict) else members:
                archive.writestr(member, data)
        return ZipPictures(path)

    return write


def read_all(rows):
    """Line number → the row, or the error, of every row."""
    results = {}
    for index in range(len(rows)):
        name, _, line = rows.location(index).rpartition(":")
        assert name == str(rows.path)
        try:
            results[int(line)] = rows.row(index).extra
        except RowError as error:
            results[int(line)] = error.kind if "\n" not in str(error) else "several lines"
    return results


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a":1}\n{"a":2}\n', {1: {"a": 1}, 2: {"a": 2}}),
        (b'{"a":1}\n{"a":2}', {1: {"a": 1}, 2: {"a": 2}}),
        (b'\n\n{"a":1}\n\n\n{"a":2}\n\n', {3: {"a": 1}, 6: {"a": 2}}),
        (b'  \n\t\n{"a":1}\n' + b" " * 100 + b'\n{"a":2}\n   ', {3: {"a": 1}, 5: {"a": 2}}),
        (b'{"a":1}\r\n\r\n{"a":2}\r\n', {1: {"a": 1}, 3: {"a": 2}}),
        (b'\xef\xbb\xbf{"a":1}\n{"a":2}', {1: {"a": 1}, 2: {"a": 2}}),
        (b'  {"a":1}  \n', {1: {"a": 1}}),
        ('{"a":"图\u2028🐶"}\n{"a":2}'.encode(), {1: {"a": "图\u2028🐶"}, 2: {"a": 2}}),
        (b'{"a":"\\n"}\n{"a":2}', {1: {"a": "\n"}, 2: {"a": 2}}),
    ],
)
def test_rows_are_numbered_as_an_editor_counts(jsonl, data, expected):
    rows = jsonl(data)
    assert len(rows) == len(expected)
    assert read_all(rows) == expected


@pytest.mark.parametrize(
    "line",
    [
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',  # a surrogate in UTF-8
        b'\xff\xfe{"a":1}',
        b'{"a":1',
        b'{"a":1}}',
        b'{"a":1} {"b":2}',
        b"{'a':1}",
        b"{a:1}",
        b"not json",
        b"\x00\x00\x00\x00",
        b'{"a":"\x01"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
        b"[1]",
        b'"text"',
        b"null",
        b"1",
        b"NaN",
    ],
    ids=lambda line: repr(line[:16]),
)
def test_a_broken_line_is_its_own_rows_trouble(jsonl, line):
    rows = jsonl(b'{"a":1}\n\n' + line + b'\n{"a":2}\n')
    assert read_all(rows) == {1: {"a": 1}, 3: "json", 4: {"a": 2}}
    with pytest.raises(RowError) as caught:
        rows.row(1)
    assert "line 1" not in str(caught.value), "the place says which line"


def test_what_json_allows_more_than_it_should_is_read(jsonl):
    rows = jsonl(b'{"a":NaN,"b":1e999,"c":"\\ud800","a":2}')
    assert rows.row(0).extra == {"a": 2, "b": float("inf"), "c": "\ud800"}
    nested = json.dumps({"a": [[{"b": {}}] * 50] * 50}).encode()
    assert jsonl(nested).row(0).extra == json.loads(nested)


def test_a_very_long_line(jsonl):
    text = "x" * 5_000_000
    rows = jsonl(b'{"a":1}\n{"a":"' + text.encode() + b'"}\n{"a":2}\n')
    assert read_all(rows) == {1: {"a": 1}, 2: {"a": text}, 3: {"a": 2}}


def test_lines_around_the_edge_of_what_is_read_at_once(tmp_path):
    step = stores.CHUNK
    path = tmp_path / "large.jsonl"
    for shift in (-2, -1, 0, 1):  # where the newline of the first line lies
        first = b'{"a":"' + b"x" * (step + shift - 8) + b'"}'
        path.write_bytes(first + b"\n\n" + b'{"b":1}\n')
        rows = JsonlRows(path)
        assert [rows.number(n) for n in range(len(rows))] == [1, 3]
        assert rows.row(1).extra == {"b": 1}


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\n\n", b"   ", b" \r\n\t\r\n" + b" " * 50])
def test_a_file_without_rows_is_refused(jsonl, data):
    with pytest.raises(DataError, match="no rows"):
        jsonl(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html>\n<html>\n", "HTML page"),
        (b"\n\n  <!doctype HTML><html>", "HTML page"),
        (b"\xef\xbb\xbf<html lang='en'>\n", "HTML page"),
        (b"<?xml version='1.0'?>\n<html>\n", "HTML page"),
        (LFS, "git-lfs pointer"),
    ],
)
def test_what_was_saved_in_place_of_the_data_is_named(jsonl, tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        jsonl(data)
    path = tmp_path / "images.zip"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_pictures(path)


def test_a_missing_file_names_the_next_step(tmp_path):
    with pytest.raises(MissingInput, match=r"no data file .*none.jsonl"):
        open_rows(tmp_path / "none.jsonl")
    with pytest.raises(MissingInput, match=r"no data file .*sft_data.jsonl — .*download dataset"):
        open_rows(tmp_path / "sft_data.jsonl")
    with pytest.raises(MissingInput, match=r"no file .*none.zip — give a folder, zip or tar with --images"):
        open_pictures(tmp_path / "none.zip")
    with pytest.raises(RowError, match="--images is missing"):
        open_pictures(None).read("a.jpg")


def test_memory_holds_offsets_and_no_rows(tmp_path):
    count, path = 200_000, tmp_path / "many.jsonl"
    path.write_bytes(b"".join(b'{"n":%d,"text":"%s"}\n' % (n, b"x" * 40) for n in range(count)))
    tracemalloc.start()
    rows = JsonlRows(path)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == count
    assert now < 16 * count + 2**20
    assert peak < 64 * 2**20, "reading in pieces"
    for index in (0, 1, 99_999, count - 1):
        assert rows.row(index).extra["n"] == index
        assert rows.location(index) == f"{path}:{index + 1}"
    assert len(pickle.dumps(rows)) < 17 * count


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (None, []),
        ("", []),
        ("  ", []),
        (" , ,", []),
        ("a.jpg", ["a.jpg"]),
        ("a.jpg, b.jpg", ["a.jpg", "b.jpg"]),
        ("a.jpg,b.jpg ,  sub/c d.jpg,", ["a.jpg", "b.jpg", "sub/c d.jpg"]),
        ("a.jpg\n", ["a.jpg"]),
        (" a.jpg ", [" a.jpg "]),
        ("a, b.jpg", ["a, b.jpg"]),
        (" a, b.PNG , c.WebP", ["a, b.PNG", "c.WebP"]),
        ("000001, 000002", ["000001", "000002"]),
        ("a.jpg, 000002", ["a.jpg", "000002"]),
        ('["a, b.jpg", " c"]', ["a, b.jpg", " c"]),
        ("[]", []),
        ("[1].jpg", ["[1].jpg"]),
        ("[1, 2].jpg", ["[1, 2].jpg"]),
        ("[1]", ["[1]"]),
        ("data:image/png;base64,AAAA", ["data:image/png;base64,AAAA"]),
        (["a.jpg, b.jpg", " c "], ["a.jpg, b.jpg", " c "]),
        ("图　片.jpg,👩‍👧.png", ["图　片.jpg", "👩‍👧.png"]),
    ],
)
def test_names_are_separated_by_commas(image, expected):
    assert image_names(image) == expected
    assert image_names(names_as_text(expected)) == expected


@pytest.mark.parametrize(
    "image",
    [3, True, 0, False, [3], ["a.jpg", None], {}, 1.5, "a\x00.jpg", "a\nb.jpg", "\ud800.jpg", "x" * 500 + "\x1b"],
)
def test_what_is_no_name_is_a_row_error(image):
    with pytest.raises(RowError) as caught:
        image_names(image)
    assert caught.value.kind == "image"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


# --- a folder ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "a.jpg").write_bytes(b"a")
    (root / ".hidden.jpg").write_bytes(b"hidden")
    (root / "图 片.jpg").write_bytes(b"zh")
    (root / "sub" / "b.jpg").write_bytes(b"b")
    (root / "sub" / "deep" / "c.jpg").write_bytes(b"c")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (root / "link.jpg").symlink_to(tmp_path / "secret.txt")
    (root / "inside.jpg").symlink_to(root / "a.jpg")
    (root / "out").symlink_to(tmp_path)
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    return root


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jpg", b"a"),
        ("./a.jpg", b"a"),
        (".hidden.jpg", b"hidden"),
        ("图 片.jpg", b"zh"),
        ("sub/b.jpg", b"b"),
        ("sub\\b.jpg", b"b"),
        ("sub/deep/c.jpg", b"c"),
        ("inside.jpg", b"a"),
        ("link.jpg", b"secret"),
        ("out/secret.txt", b"secret"),
    ],
)
def test_a_folder_finds(folder, name, data):
    assert open_pictures(folder).read(name) == data


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../secret.txt",
            "sub/../../secret.txt",
            "..\\secret.txt",
            "sub/deep/../b.jpg",
            "../a.jpg",
            "%2e%2e/secret.txt",
            "out/%2e%2e/a.jpg",
            "file:///../secret.txt",
            "somewhere/else/a.jpg",
            "/data/coco/a.jpg",
            "loop.jpg",
            "pipe.jpg",
        ),
        *(
            "b.jpg",
            "c.jpg",
            "none.jpg",
            "A.JPG",
            "sub",
            "sub/",
            ".",
            "..",
            "/",
            "~",
            "a.jpg/",
            "a.jpg/x",
            "",
            "*",
            "a*",
        ),
        *("x" * 300, "x/" * 3000, "/etc/passwd", "/dev/zero", "a\x00.jpg", "\ud800.jpg"),
    ],
    ids=lambda name: ascii(name[:20]),
)
def test_a_folder_refuses(folder, name):
    if name == "a.jpg/":  # a path library drops the slash
        assert FolderPictures(folder).read(name) == b"a"
        return
    with pytest.raises(RowError) as caught:
        FolderPictures(folder).read(name)
    assert caught.value.kind.startswith("image")
    assert "secret" not in str(caught.value).replace(name, "")


def test_no_absolute_path_leads_out_of_the_folder(folder):
    with pytest.raises(RowError, match="no such image"):
        FolderPictures(folder).read(str(folder.parent / "secret.txt"))
    assert FolderPictures(folder).read(str(folder / "sub" / "b.jpg")) == b"b"


def test_a_file_of_gigabytes_is_not_read(folder, zipped, monkeypatch):
    monkeypatch.setattr(row, "PICTURE_LIMIT", 10)
    (folder / "large.jpg").write_bytes(bytes(11))
    for pictures in (FolderPictures(folder), zipped({"large.jpg": bytes(11)}, zipfile.ZIP_DEFLATED)):
        with pytest.raises(RowError, match=r"large\.jpg: 11 bytes") as caught:
            pictures.read("large.jpg")
        assert caught.value.kind == "image too large"


# --- a zip ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_in_place_however_it_is_packed(zipped, tmp_path, compression):
    members = {f"d/{n}.jpg": random.Random(n).randbytes(200) + bytes(500) for n in range(20)}
    pictures = zipped(members, compression)
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, data in members.items():
        assert pictures.read(name) == pictures.read(name.removeprefix("d/")) == data
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing is unpacked"


@pytest.mark.parametrize(("compression", "method"), [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "LZMA")])
def test_a_member_whose_unpacking_has_no_bound_is_refused(zipped, compression, method):
    pictures = zipped({"a.jpg": bytes(1000)}, compression)
    with pytest.raises(RowError, match=rf"^a\.jpg: compressed with {method} in .*create the zip again$") as caught:
        pictures.read("a.jpg")
    assert caught.value.kind == "image broken"


@pytest.mark.parametrize("prefix", ["", "a/", "pretrain_images/", "./", "a/b/c/", "图/"])
@pytest.mark.parametrize("carried", ["", "./", "/"])
def test_folders_in_front_of_a_member_do_not_matter(zipped, prefix, carried):
    pictures = zipped({f"{prefix}one.jpg": b"1", f"{prefix}two.jpg": b"2", "readme.txt": b""})
    assert pictures.read(f"{carried}one.jpg") == b"1"


def test_the_member_that_fits_best_is_taken(zipped):
    pictures = zipped({"a.jpg": b"top", "x/a.jpg": b"x", "x/y/a.jpg": b"xy", "z/b.jpg": b"b", "q/z/b.jpg": b"qb"})
    assert pictures.read("a.jpg") == b"top"
    assert pictures.read("x/a.jpg") == b"x"
    assert pictures.read("y/a.jpg") == b"xy"
    assert pictures.read("/home/x/y/a.jpg") == b"xy", "the longest of those that end the name"
    assert pictures.read("z/b.jpg") == b"b"
    with pytest.raises(RowError, match="2 members") as caught:
        pictures.read("b.jpg")
    assert caught.value.kind == "image ambiguous"
    with pytest.raises(RowError, match="no such image"):
        pictures.read("w/b.jpg")


@pytest.mark.parametrize("name", ["none.jpg", "ne.jpg", "one.jp", "ONE.JPG", "d", "d/", "/", ".", "", "one.jpg/x", "*"])
def test_a_zip_lacks(zipped, name):
    pictures = zipped({"d/": b"", "d/one.jpg": b"1"})
    with pytest.raises(RowError, match="no such image") as caught:
        pictures.read(name)
    assert caught.value.kind == "image missing"


def test_odd_member_names(zipped, tmp_path):
    odd = [
        ".hidden.jpg",
        "..dots.jpg",
        "a b, c.jpg",
        "émigré.jpg",
        "图片/狗🐶.jpg",
        unicodedata.normalize("NFD", "ü.jpg"),
    ]
    pictures = zipped({name: name.encode() for name in odd})
    for name in odd:
        assert pictures.read(name) == name.encode()
    with pytest.raises(RowError):
        pictures.read("hidden.jpg")


def test_a_zip_from_windows(zipped):
    pictures = zipped({"images\\a.jpg": b"a", "images\\sub\\b.jpg": b"b"})
    assert pictures.read("a.jpg") == pictures.read("images/a.jpg") == pictures.read("images\\a.jpg") == b"a"
    assert pictures.read("sub/b.jpg") == b"b"


def test_members_that_point_outside_are_only_names(zipped, tmp_path):
    pictures = zipped({"../../evil.jpg": b"evil", "/abs.jpg": b"abs", "ok.jpg": b"ok"})
    assert pictures.read("evil.jpg") == b"evil"
    with pytest.raises(RowError, match=r"`\.\.` in an image name"):
        pictures.read("../../evil.jpg")
    assert pictures.read("abs.jpg") == b"abs"
    assert not (tmp_path.parent.parent / "evil.jpg").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_was_written_twice_is_the_later_one(zipped):
    assert zipped([("d/a.jpg", b"old"), ("d/a.jpg", b"new")]).read("a.jpg") == b"new"


def test_an_empty_zip(zipped):
    with pytest.raises(RowError, match="no such image"):
        zipped({}).read("a.jpg")


def test_an_encrypted_member(zipped):
    pictures = zipped({"a.jpg": b"secret", "b.jpg": b"open"})
    data = bytearray(pictures.path.read_bytes())
    data[6] |= 1  # the flag in the member's own header …
    data[data.index(b"PK\x01\x02") + 8] |= 1  # … and in the directory
    pictures.path.write_bytes(data)
    pictures = ZipPictures(pictures.path)
    with pytest.raises(RowError, match=r"a\.jpg: encrypted in") as caught:
        pictures.read("a.jpg")
    assert caught.value.kind == "image broken"
    assert pictures.read("b.jpg") == b"open"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_leaves_its_neighbours_alone(zipped, compression):
    names = ["a.jpg", "bad.jpg", "c.jpg"]
    pictures = zipped({name: random.Random(name).randbytes(3000) for name in names}, compression)
    with zipfile.ZipFile(pictures.path) as archive:
        offset = archive.getinfo("bad.jpg").header_offset
    data = bytearray(pictures.path.read_bytes())
    data[offset + 600 : offset + 620] = bytes(20)
    pictures.path.write_bytes(data)
    pictures = ZipPictures(pictures.path)
    with pytest.raises(RowError, match=r"bad\.jpg: damaged") as caught:
        pictures.read("bad.jpg")
    assert caught.value.kind == "image broken"
    for name in ("a.jpg", "c.jpg"):
        assert pictures.read(name) == random.Random(name).randbytes(3000)


def test_a_member_that_lies_about_its_size(zipped):
    pictures = zipped({"a.jpg": b"x" * 1000}, zipfile.ZIP_DEFLATED)
    data = bytearray(pictures.path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24
    for claimed in (10, 999, 2**31):
        data[at : at + 4] = struct.pack("<I", claimed)
        pictures.path.write_bytes(data)
        with pytest.raises(RowError):
            ZipPictures(pictures.path).read("a.jpg")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:-22],
        lambda data: b"",
        lambda data: b"PK\x03\x04",
        lambda data: bytes(len(data)),
        lambda data: random.Random(0).randbytes(3000),
        lambda data: data.replace(b"PK\x01\x02", b"PK\x09\x09"),
    ],
    ids=["half", "a byte short", "no end", "empty", "signature", "zeros", "random", "directory"],
)
def test_a_zip_that_broke_off_says_so(zipped, spoil):
    path = zipped({f"{n}.jpg": bytes(100) for n in range(20)}).path
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match="download it again") as caught:
        open_pictures(path)
    assert not isinstance(caught.value, RowError)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_anywhere_is_an_error_of_ours(tmp_path, compression):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("图/a.jpg", b"a" * 300)
        archive.writestr("b.jpg", random.Random(0).randbytes(200))
    rng, path, refused = random.Random(compression), tmp_path / "damaged.zip", 0
    for _ in range(150):
        data = bytearray(buffer.getvalue())
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            pictures = ZipPictures(path)
            for name in ("a.jpg", "b.jpg"):
                pictures.read(name)
        except DataError:
            refused += 1
    assert refused > 30


def test_zip64_and_many_members(tmp_path, monkeypatch):
    path, count = tmp_path / "many.zip", 1500
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 100)  # above it zip64 begins, else at 65,535
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(count):
            archive.writestr(zipfile.ZipInfo(f"images/{n % 10}/{n:06d}.jpg"), b"%d" % n)
        with archive.open("large.jpg", "w", force_zip64=True) as member:
            member.write(b"large")
    assert b"PK\x06\x06" in path.read_bytes()[-200:], "the end of directory of a zip64"
    pictures = ZipPictures(path)
    for n in (0, 1, count // 2, count - 1):
        assert pictures.read(f"{n:06d}.jpg") == b"%d" % n
    assert pictures.read("large.jpg") == b"large"
    with pytest.raises(RowError):
        pictures.read(f"{count:06d}.jpg")


# --- several processes ------------------------------------------------------------------------------------------------


def content(number) -> bytes:
    return b"%d," % number * 5000  # larger than what a file object reads ahead


@pytest.fixture
def open_stores(tmp_path):
    """Rows, and stores of their pictures, whose handles are open and stand somewhere in their files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for n in range(40):
            (folder / f"{n}.jpg").write_bytes(content(n))
            archive.writestr(f"p/{n}.jpg", content(n))
    lines = [json.dumps({"n": n, "image": f"{n}.jpg", "long": content(n).decode()}) for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    stores_ = JsonlRows(tmp_path / "rows.jsonl"), FolderPictures(folder), ZipPictures(tmp_path / "pictures.zip")
    assert read_many(stores_, 0) == []
    return stores_


def read_many(open_stores, seed) -> list[int]:
    """Read rows and their pictures in a random order; the numbers of those that came out wrong."""
    rows, *pictures = open_stores
    rng, wrong = random.Random(seed), []
    for _ in range(60):
        index = rng.randrange(len(rows))
        row = rows.row(index)
        if row.extra["n"] != index or any(store.read(row.images[0]) != content(index) for store in pictures):
            wrong.append(index)
    return wrong


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_do_not_disturb_each_other(open_stores, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    # In a process of its own: this one may have threads of other tests, whose locks a fork would inherit.
    process = multiprocessing.get_context("spawn").Process(target=read_side_by_side, args=(open_stores, method))
    process.start()
    process.join(240)
    assert process.exitcode == 0


def read_side_by_side(stores, method):
    assert read_many(stores, 5) == []  # whose files are open now
    with multiprocessing.get_context(method).Pool(2) as pool:
        waiting = [pool.apply_async(read_many, (stores, seed)) for seed in range(4)]
        assert read_many(stores, 6) == []
        assert [task.get(timeout=120) for task in waiting] == [[]] * 4
        pool.close()
        pool.join()  # a signal may come before a new process heeds it


def test_a_fork_opens_its_files_anew(open_stores):
    """A handle that was inherited shares its position with the parent's: a read here would move a read there."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork on this system")
    rows, _, pictures = open_stores
    inherited = [rows.handle.fileno(), pictures.handle.fileno()]
    before = [os.lseek(handle, 7, os.SEEK_SET) for handle in inherited]
    child = multiprocessing.get_context("fork").Process(target=_read_and_tell, args=(open_stores,))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == 0, "the child read all it wanted"
    assert [os.lseek(handle, 0, os.SEEK_CUR) for handle in inherited] == before


def _read_and_tell(open_stores):
    raise SystemExit(len(read_many(open_stores, 1)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"{}", mtime=0), "a gzip archive"),
        ("{}\n".encode("utf-16"), "UTF-16"),
        (b"PAR1" + bytes(20), "ends in .parquet"),
        (b"BZh91AY&SY", "a bzip2 archive"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "a zstd archive"),
        (bytes(257) + b"ustar\x0000" + bytes(700), "a tar archive"),
        (b"\x89PNG\r\n\x1a\n", "an image file, not a data file"),
        (b"GGUF" + bytes(20), "model weights, not a data file"),
        (b"\x40\0\0\0\0\0\0\0{}", "model weights, not a data file"),
        (b"\x01\x02\0\x03", "not text"),
    ],
)
def test_a_file_of_another_kind_is_named_once_and_not_row_by_row(tmp_path, data, message):
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["a.jpg", "b.jpg"], "a zip of image files — give the rows .*, and the zip with --images"),
        (["rows/mine.jsonl", "rows/a.jpg"], "unpack it and give rows/mine.jsonl"),
        (["archive/data.pkl", "archive/data/0"], "model weights"),
    ],
)
@pytest.mark.parametrize("name", ["x.zip", "x.jsonl", "x.json", "x.parquet"])
def test_a_zip_given_as_rows_is_reported_with_the_option_for_it(tmp_path, members, message, name):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for member in members:
            archive.writestr(member, b"{}\n")
    with pytest.raises(DataError, match=message):
        open_rows(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_rows_beside_a_zip_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "cats_images.zip", "w") as archive:
        archive.writestr("a.jpg", b"")
    (tmp_path / "cats_data.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"give the rows \(.*cats_data\.jsonl\)"):
        open_rows(tmp_path / "cats_images.zip")


def test_names_of_pictures_may_be_a_list_and_an_array_of_rows_is_reported_with_where_it_belongs(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"conversations": [], "image": ["a, b.jpg", "c.jpg"]}\n[{}]\n[\n')
    rows = open_rows(tmp_path / "rows.jsonl")
    assert rows.row(0).images == ["a, b.jpg", "c.jpg"]
    for index in (1, 2):
        with pytest.raises(RowError, match=r"belong in a \.json file"):
            rows.row(index)


def test_where_json_breaks_is_said_in_plain_words(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"conversations": [{"role": "us\n')
    with pytest.raises(RowError, match=r"not JSON \(\w.* [^a]\w+ at character \d+\)$") as caught:
        open_rows(tmp_path / "rows.jsonl").row(0)
    assert "at at" not in str(caught.value)


def test_blank_lines_by_the_million_take_no_time_and_count(tmp_path):
    row = '{"conversations": []}'
    for blank in ("", " \t\r"):
        path = tmp_path / "rows.jsonl"
        path.write_text(f"{blank}\n" * 3_000_000 + row)
        begin = time.process_time()
        rows = open_rows(path)
        assert time.process_time() - begin < 3
        assert (len(rows), rows.number(0)) == (1, 3_000_001)


def test_blank_lines_are_those_that_python_strips_to_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "CHUNK", 7)
    draw = random.Random(4)
    for _ in range(100):
        kinds = ["", " ", "\t \r", "{}", " {}", "\x00", "\x1c", "  " * 9]
        lines = ["{}" + " " * 600, *(draw.choice(kinds) for _ in range(draw.randint(1, 30)))]  # no NUL in its head
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join([*lines, "{}"]) + draw.choice(["", "\n", " \n"]))
        rows = open_rows(path)
        expected = [number for number, line in enumerate([*lines, "{}"], 1) if line.encode().strip()]
        assert [rows.number(index) for index in range(len(rows))] == expected
