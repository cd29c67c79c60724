"""`mmv chat` as a conversation on a terminal."""

import json
import os
import pty
import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.cli.harness import SIGHT, Running

BLIND = "no image: the model answers from the text alone (add one with /image FILE)"  # as chat says once


class Conversation:
    """Someone at a terminal, talking to `mmv chat`."""

    def __init__(self, folder, *args):
        self.master, slave = pty.openpty()
        os.set_blocking(self.master, False)
        self.seen = ""
        self.mmv = Running(folder, "chat", "--plain", *SIGHT, *args, terminal=os.ttyname(slave))
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

    def interrupt(self):
        """Press Ctrl-C once the line is being read: `input` loses one that comes just behind its prompt."""
        state = Path(f"/proc/{self.mmv.pid}/stat")
        self.mmv.until(lambda: state.read_text().rpartition(") ")[2][0] == "S")
        self.mmv.send(signal.SIGINT)

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
    assert "\x1b" not in talk.seen
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
    assert re.search(r"/quit +ends the conversation", talk.type("/help"))
    assert talk.leave() == 0
    assert "Traceback" not in talk.seen
    assert "\x1b" not in talk.seen, "a plain conversation moves no cursor and has no colours"


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
    assert "1 <image> mark for 0 images" in talk.type("What is <image>?")
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
    assert talk.type("/image s3://bucket/dog.jpg").startswith("s3://bucket/dog.jpg is a web address")
    both = talk.type(f"/image {third} nowhere.jpg")
    assert both == "no image file at nowhere.jpg"
    assert "for the next question" not in talk.type("/image")  # all, or none
    assert talk.leave() == 0


def test_pictures_that_are_typed_or_dropped_go_with_the_next_question(talk, tiny_data):
    first, second = tiny_data.picture(0), tiny_data.picture(1)
    assert talk.type(f"'{first}' ") == f"for the next question: {first}"
    assert talk.type(second.as_uri()) == f"for the next question: {first}, {second}"  # a drop comes line by line
    assert talk.type("") == ""
    assert talk.type("/image none") == "no image in the conversation"
    blind = talk.type("What colour is the star?")
    assert blind.startswith(BLIND)
    for line in (f"{first} What colour is the star?", f"What colour is the star? '{first}'"):
        talk.type("/new")
        added, answer = talk.type(line).split("\n", 1)
        assert added == f"for the next question: {first}"
        assert answer
        assert talk.type("/image").endswith(f"in the conversation: {first}")
    assert talk.type("nowhere.jpg What is it?") == talk.type("nowhere.jpg") == "no image file at nowhere.jpg"
    assert talk.type("/image").endswith(f"in the conversation: {first}"), "nothing was asked"
    assert talk.leave() == 0


def test_a_question_that_was_not_read_leaves_its_pictures_waiting(talk, tiny_data):
    talk.type(f"/image {tiny_data.picture()}")
    assert talk.type("<image> or <image>?") == "the question has 2 <image> marks for 1 image"
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
    talk.interrupt()
    talk.mmv.until(lambda: "Ctrl-C again ends the conversation" in talk.read() and talk.seen.count("you> ") == 3)
    talk.type("")  # in between there was a line: the next one is the first again
    talk.interrupt()
    talk.mmv.until(lambda: talk.read().count("Ctrl-C again") == 2 and talk.seen.count("you> ") == 5)
    talk.interrupt()
    assert talk.mmv.wait().code == 0
    assert "Traceback" not in talk.read()


def test_sigterm_ends_the_conversation_without_a_word(talk):
    talk.mmv.send(signal.SIGTERM)
    assert talk.mmv.wait().code == 128 + signal.SIGTERM
    assert "Traceback" not in talk.read()


# --- commands ---------------------------------------------------------------------------------------------------------


def test_a_word_that_is_no_command_names_the_nearest(talk):
    assert talk.type("/imgae dog.jpg") == "unknown command /imgae (did you mean '/image'?) — /help shows all"
    assert talk.type("/xyzzy") == "unknown command /xyzzy — /help shows all"
    assert talk.type("/x/a.pdf Why?") == "/x/a.pdf is neither an image file nor a command — /help shows all"
    assert talk.leave() == 0


def test_before_a_question_there_is_nothing_to_repeat(talk):
    for command in ("/again", "/edit", "/blank", "/save talk.md"):
        assert talk.type(command) == "no question was asked yet"
    assert "likeliest tokens" in talk.type("/top")
    assert talk.leave() == 0


def test_again_answers_the_latest_question_only(talk, tiny_data):
    first = talk.type("有几个物体？")
    talk.type(f"/image {tiny_data.picture()}")
    second = talk.type("What colour is the star?")
    again = talk.type("/again")
    assert again.startswith(second)
    assert "temperature 0 gives the same answer each time" in again
    assert "in the conversation: " in talk.type("/image")
    assert "each time" not in talk.type("/params temperature 5")
    talk.type("/params top_p 1")
    assert {talk.type("/again") for _ in range(4)} != {second}  # a draw may be the same by chance
    assert first


def test_edit_asks_another_question_in_place_of_the_latest(talk, tiny_data):
    talk.type(f"/image {tiny_data.picture()}")
    expected = talk.type("有几个物体？")
    talk.type("/new")
    talk.type(f"/image {tiny_data.picture()}")
    talk.type("What colour is the star?")
    os.write(talk.master, b"/edit\n")
    talk.mmv.until(lambda: "edit> " in talk.read())
    assert "the latest question: What colour is the star?" in talk.seen
    assert talk.type("有几个物体？") == expected
    os.write(talk.master, b"/edit\n")
    talk.mmv.until(lambda: talk.read().count("edit> ") == 2)
    assert talk.type("") == "the question stays as it is"
    assert talk.leave() == 0


def test_system_starts_over_with_another_system_prompt(talk):
    assert talk.type("/system") == "system prompt: that of the model: You are a helpful assistant"
    first = talk.type("有几个物体？")
    assert talk.type("/system Be a star.").endswith("system prompt: Be a star.")
    assert f"{BLIND}\n" not in talk.type("有几个物体？")
    talk.type("/new")
    assert talk.type("/system") == "system prompt: Be a star."
    talk.type("/system none")
    assert f"{BLIND}\n{talk.type('有几个物体？')}" == first
    assert talk.type("/system an <image>").startswith("<image> in the system prompt")
    assert talk.leave() == 0


def test_settings_are_shown_changed_and_checked(talk):
    assert talk.type("/params").split() == [
        *("temperature", "0.0", "top_p", "0.85", "seed", "none", "top_k", "0", "min_p", "0.0"),
        *("repetition_penalty", "1.0", "max_new_tokens", "12"),
    ]
    assert talk.type("/params top-k 7") == talk.type("/params top_k=7") == "top_k 7"
    assert talk.type("/params seed 5") == "seed 5"
    assert talk.type("/params seed none") == "seed none"
    assert talk.type("/params max_new_tokens 1") == "max_new_tokens 1"
    for wrong, message in (
        ("top_q 1", "unknown setting top_q (did you mean 'top_p'?)"),
        ("top_p 7", "top_p must be above 0 and at most 1, not 7"),
        ("top_k many", "top_k is a whole number, not 'many'"),
        ("min_p x", "min_p is a number, not 'x'"),
        ("max_new_tokens 0", "max_new_tokens must be at least 1, not 0"),
    ):
        assert talk.type(f"/params {wrong}").startswith(message)
    talk.type("What colour is the star?")
    talk.type("/top on")
    assert len(talk.type("/again").splitlines()) <= 3, "an answer of one token, its rivals, and the note"
    assert talk.leave() == 0


def test_top_shows_five_rivals_for_each_token(talk, tiny_data):
    talk.type(f"/image {tiny_data.picture()}")
    talk.type("What colour is the star?")
    lines = talk.type("/top").splitlines()
    assert 0 < len(lines) <= 12
    assert all(line.count("%") == 6 for line in lines)
    assert talk.type("/top on").splitlines() == lines
    assert talk.type("/again").splitlines()[1 : 1 + len(lines)] == lines
    assert talk.type("/top") == "/top is off"
    assert talk.type("/top maybe") == "on or off, not 'maybe'"
    assert talk.leave() == 0


def test_blank_compares_with_grey_images(talk, tiny_data):
    assert talk.type("What colour is the star?")
    assert talk.type("/blank").startswith("the conversation has no image")
    talk.type(f"/image {tiny_data.picture()}")
    answer = talk.type("What colour is the star?")
    lines = talk.type("/blank").splitlines()
    assert lines[0] == f"with the images: {answer}"
    assert lines[1].startswith("with grey images: ")
    assert re.fullmatch(
        r"the answer has \d+\.\d bits of surprise with the images, \d+\.\d with grey ones: .+", lines[-1]
    )
    assert talk.type("/again").startswith(answer)
    assert talk.leave() == 0


def test_a_model_that_cannot_think_says_so(talk):
    assert talk.type("/think") == "the chat layout chatml has no think block: its model cannot think"
    assert talk.type("/think off") == "/think is off"
    assert talk.leave() == 0


def test_a_conversation_is_saved_and_no_file_replaced_unasked(talk, tiny_data, tmp_path):
    picture = tiny_data.picture()
    talk.type("/system Be <brief>.")
    talk.type(f"/image {picture}")
    first, second = talk.type("What colour is the star?"), talk.type("Is it big?")
    for name in ("talk.json", "talk.md", "talk.html"):
        assert talk.type(f"/save {tmp_path / name}") == f"saved {tmp_path / name}"
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"] == [
        {"role": "system", "content": "Be <brief>."},
        {"role": "user", "content": "What colour is the star?", "images": [str(picture)]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Is it big?"},
        {"role": "assistant", "content": second},
    ]
    assert saved["sampling"]["temperature"] == 0
    markdown = (tmp_path / "talk.md").read_text()
    assert f"![]({picture})\n\n**What colour is the star?**\n\n{first}" in markdown
    page = (tmp_path / "talk.html").read_text()
    assert "Be &lt;brief&gt;." in page
    assert page.count('<img src="data:image/png;base64,') == 1
    os.write(talk.master, f"/save {tmp_path / 'talk.md'}\n".encode())
    talk.mmv.until(lambda: "replace it? [y/N] " in talk.read())
    talk.type("Never")
    assert (tmp_path / "talk.md").read_text() == markdown
    talk.type("/new")
    talk.type("Is it big?")
    os.write(talk.master, f"/save {tmp_path / 'talk.md'}\n".encode())
    talk.mmv.until(lambda: talk.read().count("replace it? [y/N] ") == 2)
    assert talk.type("y") == f"saved {tmp_path / 'talk.md'}"
    assert "What colour" not in (tmp_path / "talk.md").read_text()
    assert talk.type("/save talk.pdf").startswith("talk.pdf must end with one of .md, .json, .html")
    assert talk.type("/save").startswith("/save needs a file name")
    assert talk.leave() == 0


def test_a_folder_and_a_pattern_name_several_images(talk, tiny_data, tmp_path):
    pictures = tmp_path / "my pictures"
    pictures.mkdir()
    for name in ("b.jpg", "a.jpg", "c.png"):
        (pictures / name).write_bytes(tiny_data.picture().read_bytes())
    (pictures / "notes.txt").write_text("no picture")
    a, b, c = (pictures / name for name in ("a.jpg", "b.jpg", "c.png"))
    assert talk.type(f"/image {pictures}") == f"for the next question: {a}, {b}, {c}"
    talk.type("/new")
    assert talk.type(f"/image '{pictures}/*.jpg'") == f"for the next question: {a}, {b}"
    assert talk.type(f"/image {tmp_path}/*.jpg") == f"no file matches {tmp_path}/*.jpg"
    (tmp_path / "empty").mkdir()
    assert talk.type(f"/image {tmp_path / 'empty'}") == f"no image file in the folder {tmp_path / 'empty'}"
    for number in range(70):
        (pictures / f"{number}.jpg").touch()
    assert talk.type(f"/image {pictures}").startswith("73 images are too many for one conversation, which holds 64")
    assert talk.leave() == 0
