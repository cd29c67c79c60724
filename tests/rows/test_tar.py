"""WebDataset shards: samples by key, read in place, and archives that say more than they have."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import time
import zipfile

import numpy as np
import pytest

from minimind_v.core.errors import DataError, RowError, UsageError
from minimind_v.core.rows import index
from minimind_v.core.rows.pictures import open_pictures
from minimind_v.core.rows.stores import open_rows
from tests.rows.made import picture, use

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


def tar_of(path, members, form=tarfile.GNU_FORMAT):
    """An archive of name → bytes, or of ready-made members."""
    with tarfile.open(path, "w", format=form) as archive:
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            if data is not None:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data) if data is not None else None)
    return path


def sample(number, key=None, text="a dog", kind="jpg"):
    key = key or f"{number:03d}"
    return [(f"{key}.{kind}", picture(number)), (f"{key}.txt", text.encode())]


def caption(rows, number):
    return rows.row(number).conversations[-1]["content"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_one_key_are_a_sample(tmp_path, form):
    long = "folder/" * 20 + "图-" + "n" * (60 if form == tarfile.USTAR_FORMAT else 150)
    if form == tarfile.USTAR_FORMAT:
        long = "folder/" * 15 + "n" * 60
    members = [
        ("README.md", b"about"),
        ("._000.jpg", b"resource fork"),
        *sample(0),
        *sample(1, long, "一只狗", "PNG"),
        ("b/2.x.json", b"{}"),
        ("b/2.jpg", picture(2)),
        ("b/2.json", json.dumps({"conversations": TALK, "source": "web"}).encode()),
    ]
    path = tar_of(tmp_path / "rows.tar", members, form)
    rows = pickle.loads(pickle.dumps(open_rows(path)))
    assert [rows.row(n).images for n in range(len(rows))] == [["000.jpg"], [f"{long}.PNG"], ["b/2.jpg"]]
    assert [rows.picture(n, 0, rows.row(n).images[0]) for n in range(3)] == [picture(n) for n in range(3)]
    assert [caption(rows, n) for n in range(3)] == ["a dog", "一只狗", "A dog."]
    assert rows.row(2).extra == {"source": "web"}
    assert rows.location(2) == f"{path}:3"
    assert not list(tmp_path.glob("*.jpg"))


@pytest.mark.parametrize(
    ("fields", "images"),
    [
        ({}, ["a.0.jpg", "a.1.jpg"]),
        ({"images": ["a.1.jpg", "a.0.jpg"]}, ["a.1.jpg", "a.0.jpg"]),
        ({"image": ["old/x.jpg", "old/y.jpg"]}, ["a.0.jpg", "a.1.jpg"]),
        ({"image": "a.1.jpg, a.0.jpg"}, ["a.1.jpg", "a.0.jpg"]),
        ({"image": ["a.1.jpg", "a.1.jpg"]}, ["a.1.jpg", "a.1.jpg"]),
    ],
)
def test_pictures_stand_in_the_order_in_which_they_are_named(tmp_path, fields, images):
    talk = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "Yes."}]
    content = json.dumps({"messages": talk} | fields).encode()
    rows = open_rows(
        tar_of(tmp_path / "a.tar", [("a.json", content), ("a.0.jpg", picture(0)), ("a.1.jpg", picture(1))])
    )
    assert rows.row(0).images == images
    assert [rows.picture(0, n, name) for n, name in enumerate(images)] == [picture(int(name[2])) for name in images]


def test_pictures_that_are_only_named_are_read_from_elsewhere(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(5))
    content = json.dumps({"conversations": TALK, "image": "a.png"}).encode()
    rows = open_rows(tar_of(tmp_path / "a.tar", [("0.json", content)]), tmp_path)
    assert rows.picture(0, 0, rows.row(0).images[0]) == picture(5)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.jpg", picture(1))], "conversation"),
        ([("1.mp4", b"film"), ("1.txt", b"a film")], "1.mp4 is not supported"),
        ([("1.jpg", picture(1)), ("1.txt", b"\xff\xfe")], "not UTF-8"),
        ([("1.jpg", picture(1)), ("1.json", b"{" * 100_000)], "not JSON"),
        ([("1.jpg", picture(1)), ("1.json", b'{"caption": ' + b"9" * 9000 + b"}")], "not JSON"),
        ([("1.jpg", picture(1)), ("1.json", b"7")], "not a JSON object"),
        ([("1.jpg", picture(1)), ("1.a.txt", b"a"), ("1.b.txt", b"b")], "several texts"),
        (
            [("1.jpg", picture(1)), ("1.json", b'{"image": ["x", "y"], "caption": "c"}')],
            "name 2 images, the sample has 1",
        ),
        ([(f"1.{n}.jpg", b"") for n in range(1001)], "more than 1000 members"),
    ],
)
def test_a_bad_sample_is_one_broken_row(tmp_path, members, message):
    rows = open_rows(tar_of(tmp_path / "a.tar", [*sample(0), *members, *sample(2, text="the last")]))
    assert len(rows) == 3
    with pytest.raises(RowError, match=message):
        use(rows, 1)
    assert (caption(rows, 0), caption(rows, 2)) == ("a dog", "the last")


def special(name, kind, link="000.jpg"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"9"])
@pytest.mark.parametrize("link", ["000.jpg", "/etc/passwd"])
def test_what_is_no_file_is_not_read(tmp_path, kind, link):
    members = [*sample(0), (special("1.jpg", kind, link), None), ("1.txt", b"a dog"), *sample(2)]
    rows = open_rows(tar_of(tmp_path / "a.tar", members))
    assert len(rows) == 3
    with pytest.raises(RowError, match=r"1\.jpg: (a link|not a file)"):
        rows.row(1)
    assert rows.picture(2, 0, "002.jpg") == picture(2)


def header(name, size, kind=b"0", tail=b""):
    """A header whose size may be anything, its sum right."""
    info = tarfile.TarInfo(name)
    block = bytearray(info.tobuf())
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + tail


def huge(number):
    """A size in base 256, as GNU tar writes what octal digits cannot hold."""
    return number.to_bytes(12, "big", signed=True) if number < 0 else b"\x80" + number.to_bytes(11, "big")


@pytest.mark.parametrize("size", [8**11 - 1, huge(2**80)])
def test_a_member_that_is_larger_than_its_archive_is_a_broken_row(tmp_path, size):
    path = tar_of(tmp_path / "a.tar", [*sample(0), *sample(1)])
    data = path.read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512) + header("2.txt", size, tail=b"a dog")
    path.write_bytes(data)
    rows = open_rows(path)
    assert len(rows) == 3
    with pytest.raises(RowError, match="cut off"):
        rows.row(2)
    assert caption(rows, 1) == "a dog"


@pytest.mark.parametrize("cut", [1, 100, 511, 512, 513, 1100, 1536])
def test_of_an_archive_that_is_cut_off_the_whole_samples_are_read(tmp_path, cut):
    path = tar_of(tmp_path / "a.tar", [*sample(0), ("1.txt", b"a" * 700), ("1.jpg", picture(1))])
    whole = path.read_bytes().rstrip(b"\0")
    path.write_bytes(whole[:-cut])
    rows = open_rows(path)
    assert caption(rows, 0) == "a dog"
    assert len(rows) in (2, 3)  # where a header is cut, nothing says what it belongs to
    with pytest.raises(RowError, match=r"cut off|damaged"):
        rows.row(len(rows) - 1)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (header("2.txt", huge(-512)), "-512 bytes"),
        (header("2.txt", b"-0000000512\0"), "a member of -|no header"),
        (header("2.txt", b"nonsense\0\0\0\0"), "no header"),
        (header("././@LongLink", 2**33, b"L"), "a header of 8589934592 bytes"),
        (header("x", 2**32, b"x"), "a header of 4294967296 bytes"),
        (header("x", 512, b"x", b"9" * 512), "extended fields"),
        (header("x", 512, b"x", (b"20 size=" + b"9" * 12).ljust(512, b"\0")), "a member of|extended|no header|cut"),
        (header("x", 512, b"x", b"18 size=-99999999\n".ljust(512, b"\0")) + header("2.txt", 3), "a member of -9999"),
        (header("L", 0, b"L") * 100, "more than 16 headers"),
        (b"noise" * 1000, "no header"),
    ],
)
def test_a_damaged_header_is_named_with_its_position(tmp_path, tail, message):
    path = tar_of(tmp_path / "a.tar", sample(0))
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data + bytes(-len(data) % 512) + tail + bytes(1024))
    with pytest.raises(DataError, match=message):
        open_rows(path)


def test_a_sparse_member_is_named(tmp_path):
    path = tar_of(tmp_path / "a.tar", [*sample(0), ("1.txt", b"a dog")])
    data = path.read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512)
    more = bytearray(512)
    path.write_bytes(data + header("1.jpg", 3, b"S") + b"abc".ljust(512, b"\0") + bytes(more))
    with pytest.raises(RowError, match="sparse"):
        open_rows(path).row(1)
    members = tarfile.TarInfo("1.jpg")
    members.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": "9" * 15}
    tar_of(path, [*sample(0), (members, b"abc"), ("1.txt", b"a dog")], tarfile.PAX_FORMAT)
    with pytest.raises(RowError, match="sparse"):
        open_rows(path).row(1)


def test_a_picture_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(header("0.txt", 5, tail=b"a dog".ljust(512, b"\0")) + header("0.jpg", 300 * 2**20))
        file.truncate(1536 + 300 * 2**20 + 1024)
    rows = open_rows(path)
    with pytest.raises(RowError, match="too many for an image"):
        rows.picture(0, 0, rows.row(0).images[0])


def test_zeros_without_end_are_the_end(tmp_path):
    path = tar_of(tmp_path / "a.tar", sample(0))
    with path.open("r+b") as file:
        file.truncate(2**40)
    begin = time.process_time()
    assert len(open_rows(path)) == 1
    assert time.process_time() - begin < 5


def test_archives_that_were_joined_are_read_to_the_end(tmp_path):
    first, second = (tar_of(tmp_path / f"{n}.tar", sample(n)) for n in range(2))
    (tmp_path / "both.tar").write_bytes(first.read_bytes() + second.read_bytes())
    rows = open_rows(tmp_path / "both.tar")
    assert [rows.row(n).images for n in range(len(rows))] == [["000.jpg"], ["001.jpg"]]


def test_a_tar_of_pictures_alone_is_named(tmp_path):
    with pytest.raises(DataError, match="give the rows in its place, and the tar with --images"):
        open_rows(tar_of(tmp_path / "a.tar", [("0.jpg", picture(0))]))


def test_a_packed_tar_is_named(tmp_path):
    for name in ("a.tar.gz", "a.tgz", "a.tar"):
        with tarfile.open(tmp_path / name, "w:gz"):
            pass
        with pytest.raises(DataError, match="decompress it first"):
            open_rows(tmp_path / name)


# --- a folder of shards -----------------------------------------------------------------------------------------------


def test_shards_of_a_folder_by_split(tmp_path):
    for name, number in (("train-0.tar", 0), ("train-1.tar", 1), ("val-0.tar", 2), (".left.tar", 3)):
        tar_of(tmp_path / name, [*sample(number), *sample(number + 10)])
    messages = []
    rows = open_rows(tmp_path, say=messages.append)
    assert [rows.row(n).images for n in range(len(rows))] == [["000.jpg"], ["010.jpg"], ["001.jpg"], ["011.jpg"]]
    assert [rows.location(n) for n in (1, 2)] == [f"{tmp_path}/train-0.tar:2", f"{tmp_path}/train-1.tar:1"]
    assert rows.split == "train"
    assert "reading the split train (2 files), not validation (1 file)" in messages[0]
    rows = open_rows(tmp_path, split="val")
    assert rows.picture(1, 0, "012.jpg") == picture(12)
    assert len(open_rows(tmp_path, split="all")) == 6
    with pytest.raises(UsageError, match="--split test"):
        open_rows(tmp_path, split="test")


def test_many_samples_are_found_once(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "WORTH_KEEPING", 100)
    (tmp_path / "set").mkdir()
    for shard in range(3):
        tar_of(tmp_path / "set" / f"{shard}.tar", [pair for n in range(50) for pair in sample(50 * shard + n)])
    first = open_rows(tmp_path / "set")
    monkeypatch.setattr("minimind_v.core.rows.tar._samples", None)
    again = pickle.loads(pickle.dumps(open_rows(tmp_path / "set")))
    for n in np.random.default_rng(0).permutation(150)[:20].tolist():
        assert again.row(n) == first.row(n)
        assert again.picture(n, 0, f"{n:03d}.jpg") == picture(n)
    tar_of(tmp_path / "set" / "1.tar", sample(7))
    with pytest.raises(TypeError):  # made anew where a shard has changed
        open_rows(tmp_path / "set")


def test_each_split_of_a_folder_has_an_index_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "WORTH_KEEPING", 2)
    for name in ("train", "val"):
        tar_of(tmp_path / f"{name}.tar", [pair for n in range(3) for pair in sample(n, text=name)])
    sent = pickle.dumps(open_rows(tmp_path))
    assert caption(open_rows(tmp_path, split="val"), 2) == "val"
    assert caption(pickle.loads(sent), 2) == "train"


def test_one_tar_may_be_rows_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "WORTH_KEEPING", 2)
    path = tar_of(tmp_path / "a.tar", [pair for n in range(3) for pair in sample(n)])
    rows = pickle.loads(pickle.dumps(open_rows(path, path)))
    assert rows.picture(1, 0, "001.jpg") == picture(1)


@pytest.mark.long
def test_a_hundred_thousand_members_are_indexed_in_seconds(tmp_path):
    path = tmp_path / "many.tar"
    with path.open("wb") as file:
        for number in range(50_000):
            file.write(header(f"{number:06d}.jpg", 3, tail=b"abc".ljust(512, b"\0")))
            file.write(header(f"{number:06d}.txt", 5, tail=b"a dog".ljust(512, b"\0")))
    begin = time.process_time()
    rows = open_rows(path)
    assert len(rows) == 50_000
    assert time.process_time() - begin < 10
    assert caption(rows, 49_999) == "a dog"


# --- pictures by name -------------------------------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path):
    """A tar of pictures, and each picture's number by its name in the tar."""
    names = ["./000.jpg", "a/1.jpg", "b/1.jpg", "图/é.jpg", "x, y.JPG", "000.jpg"]
    tar_of(tmp_path / "named.tar", [(name, picture(n)) for n, name in enumerate(names)])
    return open_pictures(tmp_path / "named.tar"), tmp_path


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("000.jpg", 5),  # of two with one path the later counts
        ("a/1.jpg", 1),
        ("b\\1.jpg", 2),
        ("named/b/1.jpg", 2),
        ("图/e\u0301.jpg", 3),
        ("x, y.JPG", 4),
    ],
)
def test_pictures_in_a_tar_are_found_by_the_names_that_find_them_in_a_zip(named, name, number):
    pictures, folder = named
    assert pictures.read(name) == pickle.loads(pickle.dumps(pictures)).read(name) == picture(number)
    with zipfile.ZipFile(folder / "named.zip", "w") as archive:
        for n, member in enumerate(["a/1.jpg", "b/1.jpg", "图/é.jpg", "x, y.JPG", "000.jpg"], 1):
            archive.writestr(member, picture(n))
    assert open_pictures(folder / "named.zip").read(name) == picture(number)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1.jpg", "2 members"),
        ("c/1.jpg", "not in c"),
        ("../a/1.jpg", r"\.\."),
        ("none.jpg", "no such image in .*named.tar"),
        ("x, y.jpg", "write the name exactly like the file name"),
    ],
)
def test_a_picture_that_a_tar_has_not_is_named(named, name, message):
    with pytest.raises(RowError, match=message):
        named[0].read(name)


def test_a_tar_of_pictures_that_lost_its_end_has_the_whole_ones(tmp_path):
    path = tar_of(tmp_path / "a.tar", [("0.jpg", picture(0)), ("1.jpg", picture(1)), (special("2.jpg", b"2"), None)])
    with pytest.raises(RowError, match="a link"):
        open_pictures(path).read("2.jpg")
    whole = path.read_bytes()
    path.write_bytes(whole[:1540])
    pictures = open_pictures(path)
    assert pictures.read("0.jpg") == picture(0)
    with pytest.raises(RowError, match="cut off"):
        pictures.read("1.jpg")
    path.write_bytes(b"noise" * 1000)
    with pytest.raises(DataError, match="no header"):
        open_pictures(path)
