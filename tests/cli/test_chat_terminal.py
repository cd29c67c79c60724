"""`mmv chat` as a conversation on a terminal."""

import os
import pty
import re
import signal
import time

import pytest

from tests.cli.harness import SIGHT, Running


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


def test_a_conversation_from_the_first_word_to_the_last(talk, place, tmp_path):
    assert "/image FILE adds a picture" in talk.seen
    first = talk.type("有几个物体？")
    assert first
    second = talk.type("What colour is the star?")
    assert second
    assert talk.type("/new") == ""
    assert talk.type("有几个物体？") == first  # the conversation was forgotten
    talk.type("/new")
    assert talk.type(f"/image {place.picture()}") == ""
    seen = talk.type("What colour is the star?")
    assert seen
    assert talk.type("") == ""
    assert "/quit leaves" in talk.type("/help")
    assert talk.leave() == 0
    assert "Traceback" not in talk.seen


def test_what_cannot_be_taken_spoils_one_question_only(sighted, place, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as where a language is set
    talk = Conversation(tmp_path, "--model", sighted, "--greedy", "--max-new-tokens", 12)
    assert talk.type("/image nowhere.jpg") == "no picture at nowhere.jpg"
    assert talk.type("/image").startswith("/image FILE adds a picture")
    assert talk.type("/image " + 300 * "x") == "no picture at " + 200 * "x" + " (File name too long)"
    assert talk.type("", raw=b"\xff\n").splitlines()[-1] == "that is not UTF-8 text"
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><html>")
    assert "cannot be decoded" in talk.type(f"/image {tmp_path / 'page.jpg'}")
    assert "cannot be decoded" not in talk.type("What is it?")
    assert "1 <image> marks for 0 pictures" in talk.type("What is <image>?")
    assert talk.leave("\x04") == 0  # Ctrl-D


def test_a_picture_that_is_named_first_is_read_before_the_first_question(sighted, place, tmp_path):
    talk = Conversation(tmp_path, "--model", sighted, "--greedy", "--image", place.picture())
    asked = talk.type("What colour is the star?")
    talk.type("/new")
    talk.type(f"/image {place.picture()}")
    assert talk.type("What colour is the star?") == asked
    assert talk.leave() == 0
    refused = Conversation(tmp_path, "--model", sighted, "--image", "dog.jpg")
    assert refused.mmv.wait().code == 1
    assert "no picture at dog.jpg" in refused.read()
    assert "you> " not in refused.seen


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
