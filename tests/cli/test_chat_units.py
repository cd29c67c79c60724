"""The pieces of `mmv chat`, each by itself."""

import io
import json
import os
import re
import stat
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from minimind_v.cli import typed_line
from minimind_v.cli.chat_answers import describe_need, show_answer, show_beside, show_rivals
from minimind_v.cli.chat_images import Display, beside, find_display
from minimind_v.cli.chat_save import Talk, as_address, write_of
from minimind_v.cli.conversation import Conversation
from minimind_v.cli.terminal import Terminal
from minimind_v.cli.typed_commands import run
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.engine import Event
from minimind_v.core.generate.sampling import GREEDY
from minimind_v.core.generate.session import Session
from minimind_v.core.generate.settings import Sampling
from minimind_v.core.pages.talk import Exchange
from tests.cli.harness import sighted_model, tokenizer
from tests.tokenizers_made import thinking_tokenizer


def pixels(size=8):
    return np.random.default_rng(0).integers(0, 255, (3, size, size), np.uint8)


# --- answers on a terminal --------------------------------------------------------------------------------------------


def test_the_columns_of_rivals_stand_below_each_other_where_characters_are_wide(capsys):
    words = ["a", "星星", "star", "红"]
    trace = [Event(number, word, -1.0, ((0, -2.0),)) for number, word in enumerate(words)]
    show_rivals(Terminal(), trace, SimpleNamespace(decode=lambda ids: words[ids[0]]))
    lines = capsys.readouterr().err.splitlines()
    assert len({cell_len(line.partition("likeliest")[0]) for line in lines}) == 1
    assert len(lines) == 4


# --- images on a terminal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4000, 30), (30, 4000), (1, 1), (64, 64)])
def test_an_image_takes_a_bounded_area_beside_the_one_of_the_model(size):
    both = beside(Image.new("RGB", size), pixels())
    assert max(both.size) <= 2 * 640 + 16
    assert both.height <= both.width


def test_the_right_half_is_what_the_model_receives():
    received = pixels()
    both = np.asarray(beside(Image.new("RGB", (100, 100), "red"), received))
    height = both.shape[0]
    assert (both[:, : both.shape[1] - height - 16, 0] == 255).all()
    block = height // 8
    right = both[block // 2 :: block, both.shape[1] - height + block // 2 :: block, :3]
    assert (right[:8, :8].transpose(2, 0, 1) == received).all()


def test_half_blocks_stay_within_the_bounds():
    from textual_image.renderable import HalfcellImage

    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200, height=60)
    Display(console, HalfcellImage).show(Image.new("RGB", (30, 400)), pixels())
    lines = console.file.getvalue().splitlines()
    assert 0 < len(lines) <= 16
    assert 0 < max(line.count("▀") for line in lines) <= 64


def test_without_a_terminal_nothing_is_asked_and_nothing_shown(capsys):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    assert find_display(console) is None
    assert find_display(Console(no_color=True, force_terminal=True)) is None
    assert capsys.readouterr().out == ""


# --- the history ------------------------------------------------------------------------------------------------------


def test_the_history_is_bounded_and_its_users_alone(tmp_path):
    file = tmp_path / "mmv" / "history"
    history = typed_line._history(file)
    for number in range(typed_line.MOST_LINES + 50):
        history.store_string(f"line {number}\nand more")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    latest = f"line {typed_line.MOST_LINES + 49}\nand more"
    for _ in range(2):  # the second time from the file that was written anew
        lines = list(typed_line._history(file).load_history_strings())
        assert len(lines) == typed_line.MOST_LINES
        assert lines[0] == latest
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == ["history"]


def test_what_the_history_cannot_hold_is_left_out(tmp_path):
    history = typed_line._history(tmp_path / "history")
    for line in ("x" * (typed_line.LONGEST_LINE + 1), "\udcff", "  ", "kept"):
        history.store_string(line)
    assert list(history.load_history_strings()) == ["kept"]


def test_a_folder_that_cannot_be_written_is_no_trouble(tmp_path):
    (tmp_path / "file").touch()
    history = typed_line._history(tmp_path / "file" / "history")
    history.store_string("a line")
    assert list(history.load_history_strings()) == []


# --- two answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logprob", "blank", "verdict"),
    [
        (
            -0.1,
            -5.0,
            "the answer has 0.3 bits of surprise with the images, 14.4 with grey ones: the model uses the images",
        ),
        (
            -5.0,
            -0.1,
            "the answer has 14.4 bits of surprise with the images, 0.3 with grey ones: the images make it less likely",
        ),
        (-1.0, -1.1, "the model would answer so without the images"),
    ],
)
def test_the_need_of_images_is_told_in_bits(logprob, blank, verdict):
    traces = ([SimpleNamespace(logprob=value / 2)] * 4 for value in (logprob, blank))
    assert describe_need(*traces).endswith(verdict)


@pytest.mark.parametrize("width", [40, 100])
def test_two_answers_are_beside_each_other_where_there_is_room(width):
    terminal = Terminal()
    terminal.err = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=width)
    show_beside(terminal, ("first", "second"), ("[red] star", "a\nb"))
    lines = terminal.err.file.getvalue().splitlines()
    together = [line for line in lines if "[red] star" in line and "a" in line.split("star")[1]]
    assert bool(together) == (width == 100)


def test_a_plain_terminal_writes_no_styles(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    Terminal(plain=True).warn("a warning")
    Terminal(plain=True).reasoning("a thought")
    assert capsys.readouterr().err == "a warning\na thought"
    Terminal().warn("a warning")
    assert "\x1b" in capsys.readouterr().err


@pytest.mark.parametrize(("is_terminal", "wraps"), [(True, True), (True, False), (False, True)])
def test_only_a_terminal_that_is_not_plain_gets_answers_broken_between_words(is_terminal, wraps, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")  # which says nothing of a terminal

    def answer():
        yield from ("a thought about ", "it</think>", "\n\nA large red", " star above", " a circle")
        raise KeyboardInterrupt  # what came until then is shown

    terminal = Terminal(wraps=wraps)
    with pytest.raises(KeyboardInterrupt):
        show_answer(terminal, answer(), think=True)
    captured = capsys.readouterr()
    broken = is_terminal and wraps
    assert captured.out == ("A large red\nstar above a\ncircle" if broken else "A large red star above a circle")
    thought = re.sub(r"\x1b\[[0-9;]*m", "", captured.err)
    assert thought == ("a thought\nabout it\n\n" if broken else "a thought about it\n\n")
    terminal.say("a message [of] more than a line")
    assert capsys.readouterr().err.startswith("a message\n[of]" if broken else "a message [of] more than a line\n")


# --- a model that can think -------------------------------------------------------------------------------------------


class ScriptedLines:
    """Someone who types these lines, and then ends the conversation; the prompts are kept."""

    edits = True

    def __init__(self, *lines):
        self.lines, self.given = list(lines), []

    def read(self, prompt, text=""):
        self.given.append(text)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


class SpokenText:
    """Draws the tokens of these texts, one text an answer."""

    def __init__(self, vocabulary, *texts):
        encode = vocabulary.backend.encode
        self.ids = []
        for text in texts:
            self.ids += [*encode(text, add_special_tokens=False).ids, vocabulary.eos_id]

    def __call__(self, logits, text_ids):
        return self.ids.pop(0)


def test_reasoning_is_switched_on_shown_and_saved(tmp_path, capsys):
    vocabulary = Tokenizer.load(thinking_tokenizer(tmp_path / "thinking"))
    session = Session(sighted_model(), vocabulary, GREEDY)
    session.sampler = SpokenText(vocabulary, "A star", "of red\n</think>\n\nA star", "A cross")
    file = tmp_path / "talk.json"
    lines = ScriptedLines("What is it?", "/think", "/again", f"/save {file}", "/think off", "/edit", "Which?", "/top")
    run(Conversation(Terminal(), session, 20, lines))
    messages = json.loads(file.read_text())["messages"]
    assert messages[-1] == {"role": "assistant", "content": "A star", "reasoning_content": "of red"}
    assert len(messages) == 2
    captured = capsys.readouterr()
    assert captured.out == "A star\nA star\nA cross\n"
    assert "/think is on\nof red" in captured.err
    assert "/think is off" in captured.err
    assert "What is it?" in lines.given, "the latest question was given to be changed"


def test_an_interrupted_answer_is_kept_as_far_as_it_came(tmp_path, capsys):
    session = Session(sighted_model(), tokenizer(), GREEDY)
    ids = tokenizer().encode("A red star").ids

    def draw(logits, text_ids):
        if not ids:
            raise KeyboardInterrupt
        return ids.pop(0)

    session.sampler = draw
    file = tmp_path / "talk.json"
    run(Conversation(Terminal(), session, 20, ScriptedLines("What is it?", f"/save {file}")))
    assert json.loads(file.read_text())["messages"][-1]["content"] == "A red star"
    assert capsys.readouterr().out == "A red star\n"


# --- files ------------------------------------------------------------------------------------------------------------


def talk():
    exchange = Exchange("<b>?", "an answer\nof two lines", "a\nthought", [("my dog (1).jpg", as_address(pixels()))])
    return Talk("weights", None, Sampling(), [exchange])


def test_a_page_holds_the_text_and_the_image_and_no_markup_of_the_user(tmp_path):
    text = write_of(tmp_path / "talk.HTML")(talk())
    assert "&lt;b&gt;?" in text
    assert "<b>?" not in text
    assert "an answer\nof two lines" in text
    assert "<details>" in text
    assert text.count("data:image/png;base64,") == 1
    assert "http" not in text.replace("http-equiv", "")


def test_markdown_links_names_with_spaces(tmp_path):
    text = write_of(tmp_path / "talk.md")(talk())
    assert text.startswith("# weights\n\n![](<my dog (1).jpg>)\n\n**<b>?**\n\n> a\n> thought\n\nan answer\n")


def test_the_reasoning_is_apart_in_json(tmp_path):
    text = write_of(tmp_path / "talk.json")(talk())
    assert '"reasoning_content": "a\\nthought"' in text


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"did you mean '.html'"):
        write_of(tmp_path / "talk.htm")
