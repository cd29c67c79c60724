"""There and back without a byte lost, killed on the way and gone on with; no picture on both sides of a split."""

from __future__ import annotations

import base64
import json
import random
import shutil
import subprocess
import sys
import time
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_v.core.curate import convert as converting
from minimind_v.core.curate.convert import convert
from minimind_v.core.curate.split import split
from minimind_v.core.errors import DataError, RunError, UsageError
from minimind_v.core.rows.stores import open_rows
from tests.cli.harness import ROOT, tree
from tests.rows.made import picture, row


def read_all(rows):
    contents = []
    for index in range(len(rows)):
        row = rows.row(index)
        pictures = [rows.picture(index, position, name) for position, name in enumerate(row.images)]
        contents.append((row.conversations, row.images, row.extra, pictures))
    return contents


@pytest.fixture
def commas(tmp_path):
    """Ten rows, each with a picture of its own in whose name is a comma, as only a list can tell it."""
    for n in range(10):
        (tmp_path / f"{n}, 1.png").write_bytes(picture(n))
    lines = [json.dumps(json.loads(row("<image>q", "a")) | {"image": [f"{n}, 1.png"]}) for n in range(10)]
    (tmp_path / "commas.jsonl").write_text("\n".join(lines))
    return open_rows(tmp_path / "commas.jsonl", tmp_path)


def test_names_with_commas_lose_no_picture(commas, tmp_path):
    pictures = [content[3] for content in read_all(commas)]
    for out in (tmp_path / "new" / "rows.parquet", tmp_path / "new" / "rows.jsonl"):
        assert [content[3] for content in read_all(open_rows(*convert(commas, out).files))] == pictures
    done = split(commas, tmp_path / "parts", 3, seed=0)
    sides = [read_all(open_rows(path, tmp_path)) for path in (done.train, done.held_out)]
    assert sorted(content for side in sides for content in side) == sorted(read_all(commas))


ODD_NAMES = [
    *("a, b.jpg", "a.jpg, b.jpg", " lead.png", "trail .png", "a.png ", "100%.jpg", "my%20dog.jpg", "my dog.jpg"),
    *("sub\\c.jpg", "sub\\d, e.jpg", "C:\\data\\f.jpg", "/data/g.jpg", "file:///data/h.jpg", "./i.jpg", "[1].jpg"),
    *(
        '["j.jpg"]',
        "小狗.jpg",
        "e\u0301.jpg",
        "\u00e9.jpg",
        "UP.JPG",
        "up.jpg",
        "data:x,y.png",
        "k/l~2.jpg",
        "no ending",
    ),
]


@pytest.mark.parametrize("together", [False, True], ids=["one a row", "all in a row"])
def test_no_picture_is_renamed(tmp_path, together):
    cells = [[name] for name in ODD_NAMES] if not together else [ODD_NAMES[2:], ODD_NAMES[:2]]
    rows = [row("<image>" * len(names), f"a{n}").decode() for n, names in enumerate(cells)]
    numbers = {name: picture(n) for n, name in enumerate(ODD_NAMES)}
    columns = {
        "conversations": [json.dumps(json.loads(text)["conversations"]) for text in rows],
        "image_bytes": [[numbers[name] for name in names] for names in cells],
        "image": [json.dumps(names) for names in cells],
    }
    pq.write_table(pa.table(columns), tmp_path / "odd.parquet")
    store = open_rows(tmp_path / "odd.parquet")
    whole = read_all(store)
    assert [images for _, images, _, _ in whole] == cells
    for out in ("a.jsonl", "b.parquet", "c.jsonl"):
        store = open_rows(*convert(store, tmp_path / out).files)
        assert read_all(store) == whole
    done = split(store, tmp_path / "parts", 1, seed=0)
    sides = [read_all(open_rows(path, store.pictures)) for path in (done.train, done.held_out)]
    assert sorted((content for side in sides for content in side), key=str) == sorted(whole, key=str)


def test_two_pictures_of_one_name_stay_two(tmp_path):
    talk = json.dumps(json.loads(row("<image><image>", "a"))["conversations"])
    columns = {
        "conversations": [talk] * 2,
        "image_bytes": [[picture(1), picture(2)], [picture(3), picture(2)]],
        "image": ['["a\\\\x.png", "a/x.png"]'] * 2,
    }
    pq.write_table(pa.table(columns), tmp_path / "odd.parquet")
    rows = read_all(open_rows(*convert(open_rows(tmp_path / "odd.parquet"), tmp_path / "a.jsonl").files))
    assert [pictures for _, _, _, pictures in rows] == columns["image_bytes"]


def test_what_is_read_is_not_written_over(commas, tmp_path):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for write in (
        lambda: convert(commas, tmp_path / "commas.jsonl", overwrite=True),
        lambda: split(open_rows(shutil.copy(commas.path, tmp_path / "train.jsonl"), tmp_path), tmp_path, 3, 0, True),
    ):
        with pytest.raises(UsageError, match="is an input"):
            write()
    (tmp_path / "train.jsonl").unlink()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("packed", [False, True])
def test_a_split_that_cannot_be_finished_leaves_neither_side(commas, tmp_path, packed):
    rows = open_rows(convert(commas, tmp_path / "rows.parquet").files[0]) if packed else commas
    ending = "parquet" if packed else "jsonl"
    (tmp_path / "parts" / f"train.{ending}" / "inner").mkdir(parents=True)
    with pytest.raises((RunError, UsageError), match=f"train.{ending}"):
        split(rows, tmp_path / "parts", 3, seed=0, overwrite=True)
    assert not (tmp_path / "parts" / f"held_out.{ending}").exists()


@pytest.fixture
def source(tmp_path):
    """Thirty rows with no, one or two pictures, odd names, and keys of their own."""
    rng, lines = random.Random(0), []
    names = [f"{n}.png" for n in range(8)] + ["sub/deep/8.png", "图 片.png"]
    with zipfile.ZipFile(tmp_path / "rows_images.zip", "w") as archive:
        for n, name in enumerate(names):
            archive.writestr(f"images/{name}", picture(n) + bytes(n))
    for n in range(30):
        shown = rng.sample(names, rng.choice((0, 1, 1, 2)))
        fields = json.loads(row("<image>" * len(shown) + f"q{n} 🐶\ud800", f"a{n}", ", ".join(shown) or None))
        lines.append(json.dumps(fields | ({"id": n, "more": {"x": [1, None]}} if n % 3 else {})))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return open_rows(tmp_path / "rows.jsonl", tmp_path / "rows_images.zip")


@pytest.mark.parametrize("part_rows", [1, 7, 1000])
def test_there_and_back_without_loss(source, tmp_path, monkeypatch, part_rows):
    monkeypatch.setattr(converting, "PART_ROWS", part_rows)
    before = read_all(source)
    done = convert(source, tmp_path / "new" / "rows.parquet")
    assert (done.rows, done.resumed_at) == (30, 0)
    converted = open_rows(tmp_path / "new" / "rows.parquet")
    assert read_all(converted) == before
    back = convert(converted, tmp_path / "back" / "rows_data.jsonl")
    assert back.files == [tmp_path / "back" / "rows_data.jsonl", tmp_path / "back" / "rows_images.zip"]
    assert read_all(open_rows(*back.files)) == before
    assert len(zipfile.ZipFile(back.files[1]).namelist()) <= 10, "a picture of several rows is stored once"
    assert tree(tmp_path / "back") == ["rows_data.jsonl", "rows_images.zip"], "no parts are left"
    with pytest.raises(UsageError, match="--overwrite"):
        convert(source, tmp_path / "new" / "rows.parquet")
    with pytest.raises(UsageError, match=r"must end in \.jsonl or \.parquet"):
        convert(source, tmp_path / "rows.txt")


def test_pictures_without_names_and_of_the_same_name(tmp_path):
    import pyarrow as pa

    talk = row("<image>", "a").decode()
    table = pa.table(
        {
            "conversations": [json.dumps(json.loads(talk)["conversations"])] * 4,
            "image_bytes": [picture(1), picture(2), picture(1), b"\xff\xd8jpeg"],
            "image": [None, "x.png", "x.png", "../../x.jpg"],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    files = convert(open_rows(tmp_path / "rows.parquet"), tmp_path / "out.jsonl").files
    assert sorted(zipfile.ZipFile(files[1]).namelist()) == ["00000001.png", "x.jpg", "x.png", "x~2.png"]
    stored = [pictures for *_, pictures in read_all(open_rows(*files))]
    assert stored == [[picture(1)], [picture(2)], [picture(1)], [b"\xff\xd8jpeg"]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", row("<image>q", "a", image="1.png"), "--images is missing — give"),
        ("rows.csv", "image,caption\n1.png,红色的圆\n".encode("gbk"), "save the file as UTF-8"),
    ],
)
def test_the_error_of_a_row_that_can_be_repaired_does_not_advise_to_skip_it(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(DataError, match=message) as caught:
        convert(open_rows(tmp_path / name), tmp_path / "out.parquet")
    assert "--fix" not in str(caught.value)


def test_a_broken_row_stops_it_and_nothing_has_the_final_name(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([row("a", "b"), b"{", row("a", "b")]))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON.*--fix"):
        convert(open_rows(tmp_path / "rows.jsonl"), tmp_path / "rows.parquet")
    assert tree(tmp_path) == ["rows.jsonl"]


SLOW = """
import sys, time
from pathlib import Path
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.curate import convert as converting
converting.PART_ROWS = 20
read = converting.read_whole
converting.read_whole = lambda rows, index: (time.sleep(0.005), read(rows, index))[1]
data, images, out = map(Path, sys.argv[1:])
done = converting.convert(open_rows(data, images), out)
print(done.resumed_at)
"""


@pytest.mark.long
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_killed_conversion_continues_when_started_again(tmp_path, ending):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for n in range(50):
            archive.writestr(f"{n}.png", picture(n))
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(row("<image>", f"a{n}", f"{n % 50}.png") for n in range(300)))
    out = tmp_path / f"out.{ending}"
    command = [sys.executable, "-c", SLOW, str(tmp_path / "rows.jsonl"), str(tmp_path / "p.zip"), str(out)]
    for count in (2, 6):
        with subprocess.Popen(command, cwd=ROOT) as process:
            while len(list(tmp_path.glob(f".out.{ending}.parts/part-*.{ending}"))) < count:
                assert process.poll() is None
                time.sleep(0.005)
            process.kill()
        assert not out.exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 120 <= int(done.stdout) < 300
    images = tmp_path / "out_images.zip" if ending == "jsonl" else None
    assert read_all(open_rows(out, images)) == read_all(open_rows(tmp_path / "rows.jsonl", tmp_path / "p.zip"))
    assert not list(tmp_path.glob(".out*"))


def test_no_picture_is_on_both_sides(tmp_path):
    rng = random.Random(1)
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for n in range(80):
            archive.writestr(f"{n}.png", picture(n % 60))  # twenty of them under two names
    lines = []
    for n in range(200):
        shown = rng.sample(range(80), rng.choice((0, 1, 1, 1, 2)))
        lines.append(row("<image>" * len(shown) + "q", f"a{n}", ", ".join(f"{p}.png" for p in shown) or None))
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    source = open_rows(tmp_path / "rows.jsonl", tmp_path / "p.zip")
    sides = {}
    for seed in (1, 1, 2):
        done = split(source, tmp_path / "parts", 0.1, seed, overwrite=True)
        train, held = (read_all(open_rows(path, tmp_path / "p.zip")) for path in (done.train, done.held_out))
        assert 0 < len(held) <= 20
        assert sorted(content[0][1]["content"] for content in train + held) == sorted(f"a{n}" for n in range(200))
        assert not {p for content in train for p in content[3]} & {p for content in held for p in content[3]}
        assert sides.setdefault(seed, held) == held
    assert sides[1] != sides[2]
    packed = convert(source, tmp_path / "rows.parquet").files[0]
    done = split(open_rows(packed), tmp_path / "packed", 15, 1)
    assert 0 < done.held_out_rows <= 15
    assert done.held_out.suffix == ".parquet"
    assert len(open_rows(done.train)) + len(open_rows(done.held_out)) == 200
    with pytest.raises(UsageError, match="one side empty"):
        split(source, tmp_path / "none", 0.0001, 1)


def test_a_second_run_into_the_same_file_is_refused_and_harms_nothing(source, tmp_path):
    out = tmp_path / "rows.parquet"
    results = []

    def meanwhile(done, total):
        with pytest.raises(RunError, match="another process is writing it"):
            convert(source, out)
        results.append(done)

    convert(source, out, progress=meanwhile)
    assert results == [30]
    assert read_all(open_rows(out)) == read_all(source)
    assert not (tmp_path / ".rows.parquet.parts").exists()


def test_a_row_whose_pictures_are_not_read_is_neither_converted_nor_split(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"conversations": [{"role": "user", "content": f"{n}?"}]} | ({"video": "a.mp4"} if n == 3 else {})
            for n in range(9)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for run in (
        lambda: convert(open_rows(path), tmp_path / "out.parquet"),
        lambda: convert(open_rows(path), tmp_path / "out.jsonl"),
        lambda: split(open_rows(path), tmp_path / "parts", 3, 0),
    ):
        with pytest.raises(DataError, match=r"rows\.jsonl:4: images or videos in `video` are not supported.*--fix"):
            run()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_split_of_rows_with_pictures_in_base64_has_them_still(tmp_path):
    kinds = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
    data = [picture(number, kind) for number, kind in enumerate(kinds)]
    texts = [base64.b64encode(content).decode() for content in data]
    lines = [{"image": f"data:image/x;base64,{text}", "caption": f"{n}"} for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = split(open_rows(tmp_path / "rows.jsonl"), tmp_path / "parts", 2, seed=0)
    for path in (done.train, done.held_out):
        rows = open_rows(path)
        for number in range(len(rows)):
            row = rows.row(number)
            assert rows.picture(number, 0, row.images[0]) == data[int(row.conversations[-1]["content"])]
