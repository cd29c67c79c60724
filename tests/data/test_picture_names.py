"""The names of pictures, as people and terminals write them."""

import base64
import os
from pathlib import Path
from unittest import mock

import pytest

from minimind_v.core.data import picture_names
from minimind_v.core.data.picture_names import (
    files_of,
    pictures_in,
    read_picture,
    read_pictures,
    split_line,
    split_names,
)
from minimind_v.core.errors import MissingInput, UsageError

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
ADDRESS = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("dog.jpg", "my dog.jpg", "it's.jpg", "two  spaces.jpg", "back\\slash.jpg", "#1.jpg", "100%25.jpg"):
        (tmp_path / name).write_bytes(PNG)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("dog.jpg", ["dog.jpg"]),
        ("  dog.jpg \r\n", ["dog.jpg"]),
        ("my dog.jpg", ["my dog.jpg"]),
        ("'my dog.jpg' ", ["my dog.jpg"]),
        ('"my dog.jpg"', ["my dog.jpg"]),
        ("my\\ dog.jpg ", ["my dog.jpg"]),
        ("it's.jpg", ["it's.jpg"]),
        ("'it'\\''s.jpg'", ["it's.jpg"]),
        ("back\\slash.jpg", ["back\\slash.jpg"]),
        ("dog.jpg 'my dog.jpg' it\\'s.jpg", ["dog.jpg", "my dog.jpg", "it's.jpg"]),
        ("dog.jpg #1.jpg", ["dog.jpg", "#1.jpg"]),
        ("dog.jpg\nnowhere.jpg", ["dog.jpg", "nowhere.jpg"]),
        ("no such cat.jpg", ["no such cat.jpg"]),
        ("it's nowhere.jpg", ["it's nowhere.jpg"]),
        (ADDRESS, [ADDRESS]),
        ("  ", []),
    ],
)
def test_names_are_kept_apart(typed, names):
    assert split_names(typed) == names


@pytest.mark.parametrize("name", ["~/dog.jpg", "dog.jpg", "100%25.jpg", "file:///{}/my%20dog.jpg", "FILE://localhost/{}/dog.jpg",
                                  "file:/{}/100%2525.jpg", "file:///{}/100%25.jpg"])  # fmt: skip
def test_files_are_read(name, folder):
    assert read_picture(name.format(str(folder)[1:])).data == PNG


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_need_not_be_text(folder):
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(PNG)
    assert read_picture(f"{folder.as_uri()}/caf%E9.jpg").data == PNG


def test_without_a_home_a_tilde_is_a_name(monkeypatch, tmp_path):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["uid not found"])
    with pytest.raises(MissingInput, match=r"no image file at ~/dog\.jpg"):
        read_picture("~/dog.jpg")


def test_inline_pictures_are_read_however_they_were_written():
    body = ADDRESS.partition(",")[2]
    wrapped = "\n".join(body[at : at + 40] for at in range(0, len(body), 40))
    for address in (ADDRESS, ADDRESS.rstrip("="), f"DATA:image/png;base64,{wrapped}",
                    "data:;base64," + body.replace("+", "-").replace("/", "_"),
                    "data:image/png;name=a.png;base64," + body.replace("=", "%3D"),
                    "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG)):  # fmt: skip
        assert read_picture(address).data == PNG
    with pytest.raises(UsageError, match="damaged or cut"):
        read_picture("data:image/png;base64,!!!!")


def test_an_image_without_permission_is_not_called_missing(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(MissingInput, match=r"no permission to read the image file dog\.jpg"):
        read_picture("dog.jpg")


def test_a_zero_byte_in_a_name_is_reported():
    with pytest.raises(MissingInput, match="no image file at"):
        read_picture("a\0b.jpg")


def test_every_missing_name_is_reported():
    with pytest.raises(UsageError) as error:
        read_pictures(["a.jpg", "dog.jpg", "http://example.org/" + "x" * 100000, "."])
    message = str(error.value)
    assert all(
        phrase in message
        for phrase in ("no image file at a.jpg; ", "is a web address", ". is a folder — name an image file in it")
    )
    assert len(message) < 500


@pytest.mark.parametrize(("text", "count"), [("dog.jpg", 1), ("'dog.jpg' 'my dog.jpg' ", 2), ("nowhere.webp", 1),
                                             ("What is dog.jpg", 0), ("dog", 0), ("", 0), ("it's", 0),
                                             ("dog.jpg nowhere.jpg", 0)])  # fmt: skip
def test_a_question_of_nothing_but_names(text, count):
    assert len(pictures_in(text)) == count


@pytest.mark.parametrize(
    ("text", "names", "question"),
    [
        ("dog.jpg What is it?", ["dog.jpg"], "What is it?"),
        ("'my dog.jpg' It's big,  isn't it?", ["my dog.jpg"], "It's big,  isn't it?"),
        (r"my\ dog.jpg What is it?", ["my dog.jpg"], "What is it?"),
        ("my dog.jpg What is it?", ["my dog.jpg"], "What is it?"),
        ("dog.jpg 'my dog.jpg' Which is bigger?", ["dog.jpg", "my dog.jpg"], "Which is bigger?"),
        ("What's this?  'my dog.jpg' ", ["my dog.jpg"], "What's this?"),
        ("What is this? dog.jpg my\\ dog.jpg", ["dog.jpg", "my dog.jpg"], "What is this?"),
        ("What's this? two  spaces.jpg", ["two  spaces.jpg"], "What's this?"),
        ("it's.jpg What is it?", ["it's.jpg"], "What is it?"),
        ("dog.jpg Is it like 'my dog.jpg'", ["dog.jpg", "my dog.jpg"], "Is it like"),
        ("nowhere.jpg What is it?", ["nowhere.jpg"], "What is it?"),
        ("What is in nowhere.jpg", ["nowhere.jpg"], "What is in"),
        ("https://example.org/a.jpg What is it?", ["https://example.org/a.jpg"], "What is it?"),
        ("'my dog.jpg' ", ["my dog.jpg"], ""),
        ("Is dog.jpg a file?", [], "Is dog.jpg a file?"),
        ("What\nis it?", [], "What\nis it?"),
        (" ", [], ""),
    ],
)
def test_names_stand_before_or_behind_a_question(text, names, question):
    assert split_line(text) == (names, question)


def test_no_name_is_looked_for_in_the_middle_of_a_long_text(monkeypatch):
    stats = mock.Mock(return_value=False)
    monkeypatch.setattr(picture_names, "_exists", stats)
    text = "see a.jpg b.jpg " * 100_000 + "?"
    assert split_line(text) == ([], text)
    assert stats.call_count < 1000


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("dogs", ["dogs/a.JPG", "dogs/b.png"]),
        ("~/dogs", ["dogs/a.JPG", "dogs/b.png"]),
        ("dogs/*", ["dogs/a.JPG", "dogs/b.png", "dogs/notes.txt"]),
        ("**/a.*", ["dogs/a.JPG", "dogs/inside/a.jpg"]),
        ("dogs/[ab].*", ["dogs/a.JPG", "dogs/b.png"]),
        ("?og.jpg", ["dog.jpg"]),
        ("what?", None),
        ("odd[1].jpg", None),
        ("dog.jpg", None),
        ("nowhere.jpg", None),
        ("https://example.org/*.jpg", None),
        ("x" * 300, None),
        ("a\0b", None),
    ],
)
def test_a_folder_or_a_pattern_stands_for_its_files(folder, name, files):
    (folder / "dogs" / "inside").mkdir(parents=True)
    for file in ("dogs/a.JPG", "dogs/b.png", "dogs/.hidden.jpg", "dogs/notes.txt", "dogs/inside/a.jpg", "odd[1].jpg"):
        (folder / file).write_bytes(PNG)
    names = files_of(name)
    assert (names and [os.path.relpath(file, folder) for file in names]) == files


@pytest.mark.parametrize("name", ["empty", "empty/*", "*.gif", "odd[2].jpg"])
def test_a_folder_or_a_pattern_without_files_is_reported(folder, name):
    (folder / "empty").mkdir()
    with pytest.raises(MissingInput, match=r"no image file in the folder|no file matches"):
        files_of(name)


def test_several_patterns_and_folders_are_several_names(folder):
    (folder / "my dogs").mkdir()
    assert split_names("my dogs") == ["my dogs"]
    assert split_names("'my dogs' dog.jpg") == ["my dogs", "dog.jpg"]
    assert split_names("a*.jpg b*.jpg") == ["a*.jpg", "b*.jpg"]
    assert split_names("Is it a dog?") == ["Is it a dog?"]
