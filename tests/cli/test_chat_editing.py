"""`mmv chat` on a terminal that can move its cursor: editing, history, completion and images."""

import json
import os
import pty
import re
import signal
import stat
import termios
import time

import pytest

from tests.cli.harness import SIGHT, Running

ANSWERS = {  # a terminal's queries and its answers: the cursor, the attributes, the size of a cell
    b"\x1b[6n": b"\x1b[39;1R",
    b"\x1b[c": b"\x1b[?62;22c",
    b"\x1b[16t": b"\x1b[6;20;10t",
}


class EditedTalk:
    """Someone at a terminal that can do all that `mmv chat` asks of it."""

    def __init__(self, folder, *args, answers=ANSWERS):
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(self.master, (40, 300))  # no path is wrapped, so each is found as it is
        os.set_blocking(self.master, False)
        self.raw, self.answers = b"", answers
        self.before = termios.tcgetattr(slave)
        self.mmv = Running(folder, "chat", *SIGHT, *args, terminal=os.ttyname(slave))
        self.slave = slave
        self.until("you>")

    def read(self):
        """All that came so far; what the terminal is asked is answered."""
        try:
            while piece := os.read(self.master, 65536):
                self.raw += piece
                for query, answer in self.answers.items():
                    for _ in range(piece.count(query)):
                        os.write(self.master, answer)
        except (BlockingIOError, OSError):  # nothing more yet, or nobody there any more
            pass
        text = re.sub(r"\x1b\[(\d*)C", lambda move: " " * int(move[1] or 1), self.raw.decode(errors="replace"))
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)

    def until(self, text, start=0):
        self.mmv.until(lambda: text in self.read()[start:])

    def keys(self, keys, until):
        """Press keys, and wait until a text comes behind them."""
        start = len(self.read())
        os.write(self.master, keys.encode())
        self.until(until, start)
        return self.read()[start:]

    def complete(self, typed, until):
        """Type a text and Tab, and wait for its completion: a menu may show it before the line has it."""
        self.keys(f"{typed}\t", until)
        drawn = -1
        while drawn != len(self.raw):
            drawn = len(self.raw)
            time.sleep(1)
            self.read()

    def command(self, line, until, end="\r"):
        """Type a line, and wait until a text comes behind it, and then the prompt."""
        start = len(self.read())
        os.write(self.master, f"{line}{end}".encode())
        self.mmv.until(lambda: "you>" in self.read()[start:].partition(until)[2])
        return self.read()[start:]

    def leave(self, keys="/quit\r"):
        os.write(self.master, keys.encode())
        ended = self.mmv.wait()
        self.read()
        after = termios.tcgetattr(self.slave)
        os.close(self.slave)
        os.close(self.master)
        assert after == self.before, "the terminal is as it was"
        return ended.code


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLORTERM", raising=False)
    return tmp_path / "state"


@pytest.fixture
def start(terminal, sighted, tmp_path):
    return lambda *args, kind=EditedTalk, **how: kind(
        tmp_path, "--model", sighted, "--greedy", "--max-new-tokens", 4, *args, **how
    )


def saved(talk, folder):
    """The user's messages, as /save writes them."""
    file = folder / f"{time.monotonic_ns()}.json"
    talk.command(f"/save {file}", f"saved {file}")
    return [message["content"] for message in json.loads(file.read_text())["messages"] if message["role"] == "user"]


def test_a_line_is_edited_completed_and_remembered(start, terminal, tmp_path, tiny_data):
    talk = start()
    talk.keys("What is hig?\x1b[D\x1b[D\x1b[D\x7fb\r", "no image: ")  # back over `ig?`, and another letter
    assert saved(talk, tmp_path) == ["What is big?"]
    (tmp_path / "my folder").mkdir()
    (tmp_path / "my folder" / "a dog.jpg").write_bytes(tiny_data.picture().read_bytes())
    talk.complete("/ima", "/image")
    talk.complete(f" {tmp_path}/my f", "my folder/")
    talk.complete("a", "dog.jpg")  # the first letter may be drawn before
    talk.keys("\r", f"for the next question: {tmp_path / 'my folder' / 'a dog.jpg'}")
    assert talk.leave() == 0

    history = terminal / "mmv" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    talk = start()
    talk.keys("\x1b[A" * 4, "What is big?")
    talk.keys("\r", "no image: ")
    assert saved(talk, tmp_path) == ["What is big?"]
    assert talk.leave("\x04") == 0


def test_a_pasted_text_of_several_lines_is_one_question(start, tmp_path):
    talk = start()
    talk.keys("\x1b[200~first line\nsecond line\x1b[201~", "second line")
    talk.keys("\r", "no image: ")
    assert saved(talk, tmp_path) == ["first line\nsecond line"]
    assert talk.leave() == 0


def test_a_dropped_file_is_added_and_the_latest_question_is_given_to_be_changed(start, tmp_path, tiny_data):
    talk = start()
    talk.keys(f"\x1b[200~'{tiny_data.picture()}' \x1b[201~\r", "for the next question: ")
    talk.command("Is it red?", "\n")
    talk.keys("/edit\r", "edit> Is it red?")
    talk.command("\x7f\x7f\x7f\x7fbig?", "\n")
    assert saved(talk, tmp_path) == ["Is it big?"]
    assert "in the conversation: " in talk.command("/image", "in the conversation: ")
    assert talk.leave() == 0


def test_ctrl_c_twice_at_the_prompt_ends_the_conversation(start):
    talk = start()
    talk.keys("half a question", "half a question")
    talk.command("\x03", "Ctrl-C again ends the conversation", end="")
    talk.command("/params seed", "seed none")
    talk.command("\x03", "Ctrl-C again", end="")
    assert talk.leave("\x03") == 0
    assert "Traceback" not in talk.read()


def test_sigterm_leaves_the_terminal_as_it_was(start):
    talk = start()
    talk.keys("half a ques", "half a ques")
    talk.mmv.send(signal.SIGTERM)
    assert talk.leave("") == 128 + signal.SIGTERM
    assert "Traceback" not in talk.read()


def test_an_image_is_shown_in_half_blocks(start, tiny_data):
    talk = start("--image", tiny_data.picture())
    lines = [line for line in talk.read().split("\n") if "▀" in line]
    assert 8 <= len(lines) <= 16
    assert 40 <= max(line.count("▀") for line in lines) <= 64
    assert talk.leave() == 0


@pytest.mark.parametrize("form", ["sixel", "kitty"])
def test_an_image_is_shown_as_graphics_where_the_terminal_has_them(start, tiny_data, form):
    graphics = {"sixel": b"\x1b[?62;4c", "kitty": b"\x1b[?62c"}
    query = re.compile(rb"\x1b_Gi=(\d+),[^;]*a=q[^;]*;AAAA\x1b\\")

    class Terminal(EditedTalk):
        def read(self):
            text, answered = super().read(), getattr(self, "answered", 0)
            if form == "kitty" and len(ids := query.findall(self.raw)) > answered:
                self.answered = len(ids)
                os.write(self.master, b"\x1b_Gi=" + ids[-1] + b";OK\x1b\\")
            return text

    talk = start("--image", tiny_data.picture(), kind=Terminal, answers=ANSWERS | {b"\x1b[c": graphics[form]})
    drawn = {"sixel": b"\x1bP0;0;0q", "kitty": b"\x1b_Ga=p,"}[form]
    assert drawn in talk.raw, talk.raw[:300] + talk.raw[-300:]
    assert "▀" not in talk.read()
    assert "for the next question: " in talk.read()
    assert talk.leave() == 0


@pytest.mark.parametrize("case", ["no colours", "a terminal that does not answer", "plain", "a dumb terminal"])
def test_an_image_is_not_shown_where_the_terminal_cannot(start, tiny_data, monkeypatch, case):
    if case == "no colours":
        monkeypatch.setenv("NO_COLOR", "1")
    if case == "a dumb terminal":
        monkeypatch.setenv("TERM", "dumb")
    answers = {b"\x1b[6n": b"\x1b[39;1R"} if case == "a terminal that does not answer" else ANSWERS
    talk = start("--image", tiny_data.picture(), *(["--plain"] if case == "plain" else []), answers=answers)
    assert "▀" not in talk.read()
    assert f"for the next question: {tiny_data.picture()}" in talk.read()
    if case in ("plain", "a dumb terminal"):
        assert b"\x1b" not in talk.raw
    if case == "no colours":
        assert not re.search(rb"\x1b\[[0-9;]*3[0-7]m", talk.raw)
    assert talk.leave() == 0
