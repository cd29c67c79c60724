"""`mmv chat` as a conversation on a terminal."""

import os
import pty
import re
import shlex
import signal
import time

import pytest

from tests.cli.harness import SIGHT, Running

BLIND = "no image: the model answers from the text alone (add one with /image FILE)"  # as chat says once


class Conversation:
    """Someone at a terminal, talking to `mmv chat`."""

    def __init__(self, folder, *args):
        self.master, slave = pty.openpty()
        os.set_blocking(self.master, False)
        self.seen = ""
        self.mmv = Running(folder, "chat", *SIGHT, *args, terminal=os.ttyname(slave))
        self.mmv.until(lambda: self.read().count("you> ") == 1 or not self.mmv.alive)
        os.close(slave)

    def read(self):
        try:
            while piece := os.read(self.master, 65536):
                self.seen += piece.decode(errors="replace")
        except (BlockingIOError, OSError):  # nothing more yet, or nobody there any more
            pass
        return self.seen

    def type(self, line, raw=None):
        """Type a line, or bytes in its place; returns what came until the next prompt."""
        before, prompts = len(self.seen), self.seen.count("you> ")
        os.write(self.master, f"{line}\n".encode() if raw is None else raw)
        self.mmv.until(lambda: self.read().count("you> ") > prompts)
        shown = self.seen[before:].replace("\r", "").removeprefix(f"{line}\n").removesuffix("you> ")
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).strip()

    def leave(self, line="/quit\n"):
        os.write(self.master, line.encode())
        ended = self.mmv.wait()
        self.read()
        os.close(self.master)
        return ended.code


@pytest.fixture
def talk(sighted, tmp_path):
    return Conversation(tmp_path, "--model", sighted, "--greedy", "--max-new-tokens", 12)


def test_a_conversation_from_the_first_word_to_the_last(talk, tiny_data, tmp_path):
    assert "/image FILE adds an image" in talk.seen
    first = talk.type("有几个物体？")
    assert first
    second = talk.type("What colour is the star?")
    assert second
    assert talk.type("/new") == "a new conversation without images"
    assert f"{BLIND}\n{talk.type('有几个物体？')}" == first  # the conversation was forgotten, and that is said once
    talk.type("/new")
    assert talk.type(f"/image {tiny_data.picture()}") == f"for the next question: {tiny_data.picture()}"
    answer = talk.type("What colour is the star?")
    assert answer
    assert talk.type("") == ""
    assert "/quit ends" in talk.type("/help")
    assert talk.leave() == 0
    assert "Traceback" not in talk.seen


def test_what_cannot_be_taken_spoils_one_question_only(sighted, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as where a language is set
    talk = Conversation(tmp_path, "--model", sighted, "--greedy", "--max-new-tokens", 12)
    assert talk.type("/image nowhere.jpg") == "no image file at nowhere.jpg"
    assert talk.type("/image").startswith("/image FILE adds an image")
    long = talk.type("/image " + 300 * "x")
    assert re.fullmatch(r"no image file at x+…x+ \(300 characters\) \(File name too long\)", long)
    assert len(long) < 200
    assert talk.type("", raw=b"\xff\n").splitlines()[-1] == "the question is not UTF-8 text"
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><html>")
    assert "cannot be decoded" in talk.type(f"/image {tmp_path / 'page.jpg'}")
    assert "cannot be decoded" not in talk.type("What is it?")
    assert "1 <image> marks for 0 pictures" in talk.type("What is <image>?")
    assert talk.leave("\x04") == 0  # Ctrl-D


def test_a_picture_that_is_named_first_is_read_before_the_first_question(sighted, tiny_data, tmp_path):
    talk = Conversation(tmp_path, "--model", sighted, "--greedy", "--image", tiny_data.picture())
    asked = talk.type("What colour is the star?")
    dropped = f"removed: {tiny_data.picture()} — add one again with /image FILE"
    assert talk.type("/new") == f"a new conversation without images; {dropped}"
    talk.type(f"/image {tiny_data.picture()}")
    assert talk.type("What colour is the star?") == asked
    assert talk.leave() == 0
    refused = Conversation(tmp_path, "--model", sighted, "--image", "dog.jpg")
    assert refused.mmv.wait().code == 1
    assert "no image file at dog.jpg" in refused.read()
    assert "you> " not in refused.seen


def test_what_a_terminal_drops_is_taken(talk, tiny_data, tmp_path, monkeypatch):
    """Quotes, backslashes, addresses, spaces behind, and several at once."""
    names = ["a dog's.jpg", "ä 100%.jpg", "plain.jpg"]
    first, second, third = paths = [tmp_path / name for name in names]
    for number, path in enumerate(paths):
        path.write_bytes(tiny_data.picture(number % 2).read_bytes())
    escaped = str(first).replace(" ", "\\ ").replace("'", "\\'")
    for dropped in (f"{first}", shlex.quote(str(first)) + " ", escaped + "  ", f'"{first}"', first.as_uri()):
        assert talk.type(f"/image {dropped}").startswith("for the next question: ")
        assert talk.type("/new").count("a dog") == 1
    several = f"/image {escaped} {shlex.quote(str(second))} {third.as_uri()}"
    assert talk.type(several) == f"for the next question: {first}, {second}, {third}"
    assert talk.type("Which is bigger?")
    assert talk.type("/image").endswith(f"\nin the conversation: {first}, {second}, {third}")
    assert talk.type("/image https://example.org/dog.jpg").startswith("https://example.org/dog.jpg is a web address")
    both = talk.type(f"/image {third} nowhere.jpg")
    assert both == "no image file at nowhere.jpg"
    assert "for the next question" not in talk.type("/image")  # all, or none
    assert talk.leave() == 0


def test_pictures_typed_as_a_question_are_offered(talk, tiny_data):
    offer = talk.type(f"'{tiny_data.picture(0)}' ")
    assert "an image, not a question" in offer
    talk.type(tiny_data.picture(1).as_uri())  # a drop of several comes line by line
    added = talk.type("")
    assert added == f"for the next question: {tiny_data.picture(0)}, {tiny_data.picture(1)}"
    assert talk.type("") == ""
    assert "an image, not a question" in talk.type("nowhere.jpg")
    assert talk.type("nowhere.jpg") != talk.type("/image")  # asked as it stands
    assert "in the conversation" in talk.type("/image")
    assert "an image, not a question" in talk.type("nowhere.jpg")
    assert talk.type("") == "no image file at nowhere.jpg"
    assert talk.leave() == 0


def test_a_question_that_was_not_read_leaves_its_pictures_waiting(talk, tiny_data):
    talk.type(f"/image {tiny_data.picture()}")
    assert talk.type("<image> or <image>?") == "the question has 2 <image> marks for 1 pictures"
    assert talk.type("/image").endswith(f"for the next question: {tiny_data.picture()}")
    assert "marks" not in talk.type("What is it?")
    assert talk.type("/image").endswith(f"in the conversation: {tiny_data.picture()}")
    assert talk.leave() == 0


def test_a_conversation_that_is_too_long_forgets_its_beginning_and_says_so(talk, tiny_data):
    talk.type(f"/image {tiny_data.picture()}")
    answers = [talk.type("Is the star big? " * 200)]
    while "forgets" not in answers[-1] and len(answers) < 10:
        assert "in the conversation" in talk.type("/image")
        answers.append(talk.type("Is the star big? " * 200))
    assert 1 < len(answers) < 10
    assert "the conversation is too long: the model forgets its beginning (1 question)" in answers[-1]
    assert talk.type("/image").endswith("no image in the conversation")
    assert talk.leave() == 0


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_posix_locale_takes_any_words(sighted, tiny_data, tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    talk = Conversation(
        tmp_path, "--model", sighted, "--greedy", "--max-new-tokens", 12, "--image", tiny_data.picture()
    )
    assert "UTF-8" not in talk.type("有几个物体？")
    assert "in the conversation" in talk.type("/image")
    assert talk.leave() == 0
    assert "Traceback" not in talk.seen


def test_ctrl_c_stops_an_answer_and_then_the_conversation(sighted, tmp_path):
    chance = ("--temperature", "inf", "--top-p", 1, "--seed", 1)  # draws 3404 tokens until it draws the end
    talk = Conversation(tmp_path, "--model", sighted, "--max-new-tokens", 4000, *chance)
    os.write(talk.master, b"What do you see?\n")
    before = len(talk.read())
    talk.mmv.until(lambda: len(talk.read()) > before + 60)  # in the middle of a very long answer
    os.write(talk.master, b"\x03")
    talk.mmv.until(lambda: talk.read().count("you> ") == 2)
    assert talk.mmv.alive
    time.sleep(0.3)  # it reads from the terminal
    talk.mmv.send(signal.SIGINT)
    assert talk.mmv.wait().code == 0
    assert "Traceback" not in talk.read()
