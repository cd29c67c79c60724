"""Names of pictures as rows spell them and as files and archives of other systems hold them."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import unicodedata
import zipfile
import zlib
from pathlib import Path

import pytest

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.files import write_text
from minimind_v.core.rows import index
from minimind_v.core.rows.archives import ZipPictures
from minimind_v.core.rows.pictures import FolderPictures, open_pictures
from tests.rows.made import picture, row

NFC, NFD = (unicodedata.normalize(form, "é小.jpg") for form in ("NFC", "NFD"))
CASES = Path(__file__).parents[3] / "shared" / "cases"


def put(path: Path, members: dict[str, bytes]) -> Path:
    """A folder, or a zip where the path ends so, that holds these pictures."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        for name, data in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def put_raw(path: Path, members: list[tuple[bytes, bytes, bytes]], flags: int = 0) -> Path:
    """A zip of members with these bytes as their names, these extra fields and this content."""
    body, entries = b"", b""
    for name, extra, data in members:
        rest = (flags, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(name), len(extra))
        entries += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *rest, 0, 0, 0, 0, len(body)) + name + extra
        body += struct.pack("<4s5H3L2H", b"PK\3\4", 20, *rest) + name + extra + data
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(members), len(members), len(entries), len(body), 0)
    path.write_bytes(body + entries + end)
    return path


def unicode_path(name: str, raw: bytes) -> bytes:
    """The extra field that holds a name in UTF-8 beside its raw bytes."""
    text = name.encode()
    return struct.pack("<HHBL", 0x7075, 5 + len(text), 1, zlib.crc32(raw)) + text


def missing(pictures, name: str) -> str:
    """What is said of a picture that is not there."""
    with pytest.raises(RowError) as caught:
        pictures.read(name)
    assert caught.value.kind == "image missing"
    return str(caught.value)


@pytest.fixture(params=["pictures", "pictures.zip"])
def pictures_path(request, tmp_path):
    """Where pictures go: a folder or a zip."""
    return tmp_path / "set" / request.param if request.param == "pictures" else tmp_path / request.param


# --- spellings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored_name", "name"),
    [
        ("a, b.jpg", "a, b.jpg"),
        (" a.png", " a.png"),
        ("a.png", " a.png "),
        ("a .png", "a .png"),
        ("100%.jpg", "100%.jpg"),
        ("100%.jpg", "100%25.jpg"),
        ("my%20dog.jpg", "my%20dog.jpg"),
        ("my%20dog.jpg", "my dog.jpg"),
        ("my dog.jpg", "my%20dog.jpg"),
        ("d e/my dog.jpg", "d%20e/my%20dog.jpg"),
        ("图/狗.jpg", "%E5%9B%BE/%E7%8B%97.jpg"),
        ("x#1.jpg", "x#1.jpg"),
        ("x+1.jpg", "x+1.jpg"),
        ("[1]*?.jpg", "[1]*?.jpg"),
        ("sub/a.jpg", "sub\\a.jpg"),
        ("sub/a.jpg", ".\\sub\\a.jpg"),
        (NFC, NFD),
        (NFD, NFC),
        (f"{NFD}/{NFC}", f"{NFC}/{NFD}"),
        ("a.jpg", "pictures/a.jpg"),
        ("sub/a.jpg", "pictures/sub/a.jpg"),
        ("a.jpg", "/data/pictures/a.jpg"),
        ("a.jpg", "C:\\data\\pictures\\a.jpg"),
        ("a.jpg", "file:///data/pictures/a.jpg"),
        ("a b.jpg", "file://localhost/data/pictures/a%20b.jpg"),
        ("a.jpg", "file:///C:/data/pictures/a.jpg"),
        ("vg/a.jpg", "/home/me/data/vg/a.jpg"),
    ],
)
def test_a_picture_is_found_as_its_row_spells_it(pictures_path, stored_name, name):
    put(pictures_path, {stored_name: b"right", "other/other.jpg": b"wrong"})
    assert open_pictures(pictures_path).read(name) == b"right"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("my%20dog.jpg", "my dog.jpg"),
        ("my dog.jpg", "my%20dog.jpg"),
        (" a.jpg", "a.jpg"),
        ("a.jpg", "A.jpg"),
        (NFC, NFD),
        (NFD, NFC),
        ("pictures/a.jpg", "a.jpg"),
        ("100%25.jpg", "100%.jpg"),
    ],
)
def test_the_exact_name_comes_first(pictures_path, name, other):
    put(pictures_path, {other: b"other", name: b"exact"})
    assert open_pictures(pictures_path).read(name) == b"exact"
    assert open_pictures(pictures_path).read(other) == b"other"


def test_a_name_with_a_backslash_in_a_folder(tmp_path):
    put(tmp_path, {"a\\b.jpg": b"one file", "a/b.jpg": b"in a folder", "c/d.jpg": b"d"})
    assert FolderPictures(tmp_path).read("a\\b.jpg") == b"one file"
    assert FolderPictures(tmp_path).read("a/b.jpg") == b"in a folder"
    assert FolderPictures(tmp_path).read("c\\d.jpg") == b"d"


def test_another_case_is_named_and_not_taken(pictures_path):
    put(pictures_path, {"UP.JPG": b"", "sub/dog.jpg": b""})
    assert "(UP.JPG exists) — write the name exactly like the file name" in missing(
        open_pictures(pictures_path), "up.jpg"
    )
    assert "(dog.jpg exists)" in missing(open_pictures(pictures_path), "sub/dog.JPG")


@pytest.mark.parametrize("name", ["../a.jpg", "sub/../a.jpg", "..\\a.jpg", "C:\\data\\..\\a.jpg"])
def test_a_name_that_leads_upwards_is_refused(pictures_path, name):
    put(pictures_path, {"a.jpg": b"a", "sub/a.jpg": b"b"})
    assert "`..` in an image name" in missing(open_pictures(pictures_path), name)


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stored_name"),
    [
        ("vg/VG_100K/1.jpg", "gqa/images/1.jpg"),
        ("vg/VG_100K/1.jpg", "1.jpg"),
        ("ocr_vqa/images/1.jpg", "gqa/images/1.jpg"),
        ("ocr_vqa/images/1.jpg", "images/1.jpg"),
        ("vg/1.jpg", "xvg/1.jpg"),
        ("x/pictures/1.jpg", "1.jpg"),
        ("/data/vg/1.jpg", "1.jpg"),
        ("C:\\vg\\1.jpg", "gqa/1.jpg"),
        ("file:///data/vg/1.jpg", "1.jpg"),
    ],
)
def test_no_file_of_the_same_name_in_another_folder_is_read(pictures_path, name, stored_name):
    put(pictures_path, {stored_name: b"another picture"})
    assert "no such image" in missing(open_pictures(pictures_path), name)


def test_a_file_of_the_same_name_is_reported_with_what_to_do(pictures_path):
    put(pictures_path, {"2.jpg": b""})
    message = missing(open_pictures(pictures_path), "vg/VG_100K_2/2.jpg")
    assert message.endswith(
        "(a 2.jpg exists, but not in vg/VG_100K_2) — give the folder that contains vg/ with --images"
    )


def test_folders_that_are_the_own_ones_may_stand_in_front(tmp_path):
    folder = put(tmp_path / "vg" / "VG_100K", {"1.jpg": b"1"})
    for name in ("1.jpg", "VG_100K/1.jpg", "vg/VG_100K/1.jpg", str(folder / "1.jpg")):
        assert FolderPictures(folder).read(name) == b"1"
    for name in ("VG_100K_2/1.jpg", "coco/VG_100K/1.jpg", "vg/1.jpg"):
        missing(FolderPictures(folder), name)
    (tmp_path / "linked").symlink_to(folder)
    for name in ("linked/1.jpg", "vg/VG_100K/1.jpg"):
        assert FolderPictures(tmp_path / "linked").read(name) == b"1"


def test_a_path_to_this_very_folder_leads_nowhere_else(tmp_path):
    folder = put(tmp_path / "pictures", {"pictures/1.jpg": b"deep", "2.jpg": b"2"})
    assert FolderPictures(folder).read(str(folder / "pictures" / "1.jpg")) == b"deep"
    missing(FolderPictures(folder), str(folder / "pictures" / "2.jpg"))


def test_a_zip_is_the_folder_that_it_is_called_after(tmp_path):
    pictures = ZipPictures(put(tmp_path / "sft_images.zip", {"1.jpg": b"1", "a/2.jpg": b"2"}))
    for name in ("sft_images/1.jpg", "sft/1.jpg", "/data/sft_images/1.jpg", f"{tmp_path}/sft/1.jpg"):
        assert pictures.read(name) == b"1"
    assert pictures.read("sft_images/a/2.jpg") == pictures.read("2.jpg") == b"2"
    for name in ("images/1.jpg", "pretrain_images/1.jpg", "sft/2.jpg"):
        missing(pictures, name)


def test_links_are_followed_wherever_they_lead(tmp_path):
    put(tmp_path / "elsewhere", {"coco/train2017/a.jpg": b"a", "b.jpg": b"b"})
    folder = put(tmp_path / "data", {"c.jpg": b"c"})
    (folder / "coco").symlink_to(Path("..") / "elsewhere" / "coco")
    (folder / "b.jpg").symlink_to(tmp_path / "elsewhere" / "b.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    pictures = FolderPictures(folder)
    assert pictures.read("coco/train2017/a.jpg") == b"a"
    assert pictures.read("b.jpg") == b"b"
    missing(pictures, "gone.jpg")
    missing(pictures, str(tmp_path / "elsewhere" / "b.jpg").replace("b.jpg", "none.jpg"))
    assert missing(pictures, "coco/../c.jpg").startswith("coco/../c.jpg: `..`")


# --- zips of other systems --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True], ids=["found", "indexed"])
@pytest.mark.parametrize(
    ("raw", "extra"),
    [
        ("图片/狗.jpg".encode("gbk"), b""),
        ("图片\\狗.jpg".encode("gbk"), b""),
        ("图片/狗.jpg".encode(), b""),
        (b"??/?.jpg", unicode_path("图片/狗.jpg", b"??/?.jpg")),
        ("絵/犬.jpg".encode("cp932"), unicode_path("图片/狗.jpg", "絵/犬.jpg".encode("cp932"))),
    ],
    ids=["Windows", "Windows, backslashes", "macOS", "Unicode Path", "Unicode Path beside Japanese"],
)
def test_a_zip_whose_names_are_not_flagged(tmp_path, monkeypatch, raw, extra, kept):
    monkeypatch.setattr(index, "WORTH_KEEPING", 1)
    path = put_raw(tmp_path / "a.zip", [(raw, extra, b"dog"), (b"cat.jpg", b"", b"cat")])
    pictures = ZipPictures(path)
    if kept:
        pictures = ZipPictures(path)
    assert len(pictures) == 2
    for name in ("图片/狗.jpg", "狗.jpg", "图片\\狗.jpg"):
        assert pictures.read(name) == b"dog"
    missing(pictures, "猫/狗.jpg")


def test_a_zip_from_a_mac_holds_decomposed_names(tmp_path):
    pictures = ZipPictures(put_raw(tmp_path / "a.zip", [(f"d/{NFD}".encode(), b"", b"1")]))
    assert pictures.read(NFC) == pictures.read(NFD) == pictures.read(f"d/{NFC}") == b"1"


def test_the_standard_reading_of_an_unflagged_name(tmp_path):
    pictures = ZipPictures(put_raw(tmp_path / "a.zip", [("émigré.jpg".encode("cp437"), b"", b"1")]))
    assert pictures.read("émigré.jpg") == b"1"


def test_a_unicode_path_about_another_name_is_ignored(tmp_path):
    stale = unicode_path("dog.jpg", b"before it was renamed.jpg")
    pictures = ZipPictures(
        put_raw(tmp_path / "a.zip", [(b"cat\xff.jpg", stale, b"cat"), (b"x", b"\x75\x70\xff", b"x")])
    )
    missing(pictures, "dog.jpg")
    assert pictures.read("cat\xa0.jpg") == b"cat"
    assert pictures.read("x") == b"x"


def test_a_unicode_path_that_is_no_name(tmp_path):
    path = put_raw(tmp_path / "a.zip", [(b"dog.jpg", unicode_path("./", b"dog.jpg"), b"dog")])
    assert ZipPictures(path).read("dog.jpg") == b"dog"
    missing(ZipPictures(path), "DOG.jpg")


def test_names_that_say_utf_8_and_are_not(tmp_path):
    raw = "狗.jpg".encode("gbk")
    path = put_raw(tmp_path / "a.zip", [(raw, b"", b"dog"), (b"cat.jpg", b"", b"cat")], flags=0x800)
    assert ZipPictures(path).read("cat.jpg") == b"cat"


# --- hostile zips -----------------------------------------------------------------------------------------------------


def test_a_member_unpacks_to_no_more_than_its_directory_says(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("a.jpg", bytes(2**25))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.index(b"PK\x01\x02") + 24
    data[at : at + 4] = struct.pack("<L", 1000)
    (tmp_path / "a.zip").write_bytes(data)
    pictures = ZipPictures(tmp_path / "a.zip")
    tracemalloc.start()
    with pytest.raises(RowError, match="its size differs from its directory entry"):
        pictures.read("a.jpg")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("field", [20, 24, 42], ids=["packed", "size", "offset"])
@pytest.mark.parametrize("value", [0xFFFFFFFF, 0xFFFFFFFE, 2**31])
@pytest.mark.parametrize("extra", [b"", b"\x01\x00\x08\x00" + b"\xff" * 8, b"\x01\x00\xff\xff"])
def test_absurd_numbers_of_a_member(tmp_path, field, value, extra):
    path = put_raw(tmp_path / "a.zip", [(b"a.jpg", extra, b"a" * 100)])
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + field
    data[at : at + 4] = struct.pack("<L", value)
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(RowError, match=r"^a\.jpg: "):
        ZipPictures(path).read("a.jpg")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("field", range(8, 20, 2))
@pytest.mark.parametrize("value", [0, 1, 0x7FFF, 0xFFFF])
def test_absurd_numbers_of_a_directory(tmp_path, field, value):
    path = put_raw(tmp_path / "a.zip", [(b"%d.jpg" % n, b"", b"%d" % n) for n in range(9)])
    data = bytearray(path.read_bytes())
    data[-22 + field : -20 + field] = struct.pack("<H", value)
    path.write_bytes(data)
    with contextlib.suppress(DataError):  # what else is said of it
        pictures = ZipPictures(path)
        assert len(pictures) == 9
        assert pictures.read("3.jpg") == b"3"


def test_an_archive_behind_a_program_is_read_with_a_kept_index_too(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "WORTH_KEEPING", 1)
    path = put(tmp_path / "a.zip", {"a.jpg": b"a", "b.jpg": b"b"})
    path.write_bytes(b"#!/bin/sh\nexit\n" + path.read_bytes())
    for _ in range(2):
        assert ZipPictures(path).read("b.jpg") == b"b"


# --- what others made -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases here")
@pytest.mark.parametrize("pictures", ["pictures", "pictures.zip"])
@pytest.mark.parametrize("rows", ["rows.jsonl", "rows_list.jsonl", "rows.json"])
def test_the_cases_of_names(rows, pictures):
    from minimind_v.core.rows.stores import open_rows

    store = open_rows(CASES / "names" / rows, CASES / "names" / pictures)
    for number in range(len(store)):
        names = store.row(number).images
        assert len(names) == 1
        if names == ["up.jpg"]:
            assert "UP.JPG exists" in missing(open_pictures(CASES / "names" / pictures), names[0])
        else:
            assert store.picture(number, 0, names[0])


# --- other locales ----------------------------------------------------------------------------------------------------

LOCALES = {  # of the operating system's own programs, which make them
    "ASCII": ("", "", {"LC_ALL": "C"}),
    "Latin-1": ("de_DE", "ISO-8859-1", {"LC_ALL": "de_DE.ISO-8859-1"}),
    "GBK": ("zh_CN", "GBK", {"LC_ALL": "zh_CN.GBK"}),
}


@pytest.fixture(params=LOCALES)
def foreign(request, tmp_path):
    """The environment variables of a locale that is not UTF-8."""
    language, encoding, variables = LOCALES[request.param]
    if language:
        command = ["localedef", "-i", language, "-f", encoding, str(tmp_path / f"{language}.{encoding}")]
        try:
            status = subprocess.run(command, capture_output=True, check=False).returncode
        except OSError:
            status = 1
        if status or not sys.platform.startswith("linux"):
            pytest.skip("no such locale can be made here")
    return variables | {"LOCPATH": str(tmp_path), "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_pictures_are_found_in_a_locale_without_their_letters(tmp_path, foreign):
    folder = put(tmp_path / "图片", {"小狗.jpg": b"dog", f"图/{NFD}": b"cat"})
    code = (
        "import sys; from pathlib import Path; from minimind_v.core.rows.pictures import FolderPictures;"
        "p = FolderPictures(Path(sys.argv[1]));"
        f"assert p.read({'小狗.jpg'!a}) == p.read({'图片/小狗.jpg'!a}) == b'dog';"
        f"assert p.read({f'图/{NFC}'!a}) == b'cat'; print('ok')"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=os.environ | foreign, capture_output=True, check=False)
    assert done.stdout == b"ok\n", done.stderr


def test_the_command_line_reads_and_shows_any_name(tmp_path, foreign):
    put(tmp_path / "数据", {"小狗.jpg": picture(1), "行.jsonl": row("<image>", "a", "小狗.jpg") + b"\n" + b"{"})
    command = [sys.executable, "-m", "minimind_v", "data", "convert", "数据/行.jsonl", "新.jsonl", "--images", "数据"]
    broken = subprocess.run(command, env=os.environ | foreign, cwd=tmp_path, capture_output=True, check=False)
    assert broken.returncode == 1
    assert b": not JSON (" in broken.stderr, "the second row is told in one line"
    assert b"defect" not in broken.stderr + broken.stdout
    put(tmp_path / "数据", {"行.jsonl": row("<image>", "a", "小狗.jpg")})
    done = subprocess.run(command, env=os.environ | foreign, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "新.jsonl").read_text(encoding="utf-8"))["image"] == "小狗.jpg"
    assert ZipPictures(tmp_path / "新_images.zip").read("小狗.jpg") == picture(1)


def test_a_folder_that_was_unpacked_on_old_windows(tmp_path):
    (tmp_path / "p").mkdir()
    with open(os.fsencode(tmp_path / "p") + b"/" + "小狗.jpg".encode("gbk"), "wb") as file:
        file.write(b"dog")
    assert FolderPictures(tmp_path / "p").read("小狗.jpg") == b"dog"


def test_odd_bytes_of_a_name_are_written_as_escapes(tmp_path):
    name = os.fsdecode("数据".encode("gbk"))
    write_text(tmp_path / "notes.json", json.dumps({"file": name}, ensure_ascii=False))
    assert json.loads((tmp_path / "notes.json").read_text(encoding="utf-8")) == {"file": name}
