"""Answers are broken between words while they come."""

import random
import re

import pytest
from rich.cells import cell_len

from minimind_v.cli.word_wrap import WordWrap, wrap

TEXTS = [
    "The picture shows a large red star above a small blue circle, and nothing else.",
    "图中有一颗红色的大星星，在它下面是一个蓝色的小圆（很小），没有别的东西。",
    "A model 模型 called MiniMind-V 用来回答 questions，例如“图中有什么？”。",
    "  - a list\n  - of two\n\nand a text behind it  \nwith spaces at its end   ",
    "see https://example.com/a/very/long/address/that/no/line/can/hold/without/a/break for more",
    "family 👨‍👩‍👧👨‍👩‍👧👨‍👩‍👧 flags 🇩🇪🇨🇳🇫🇷 waves 👋🏽👋🏽 e\u0301e\u0301e\u0301 tab\tand\ttab",
    "100\N{NO-BREAK SPACE}km are one word",
    "",
    "\n\n",
]


def wrapped(pieces, width):
    """What is written of a text that comes in these pieces."""
    writes = []
    lines = WordWrap(writes.append, width if callable(width) else lambda: width)
    for piece in pieces:
        lines.add(piece)
    lines.rest()
    return "".join(writes)


def cut(text, rng):
    """A text in pieces of random lengths."""
    while text:
        size = rng.randint(1, 5)
        yield text[:size]
        text = text[size:]


def test_a_line_ends_between_words_and_has_no_spaces_there():
    assert wrapped(["The lar", "ge red st", "ar is above"], 10) == "The large\nred star\nis above"
    assert wrapped(["1234567890 next"], 10) == "1234567890\nnext"


def test_chinese_breaks_between_characters_and_no_line_begins_or_ends_with_a_wrong_mark():
    assert wrapped("图中有一颗星。", 6) == "图中有\n一颗\n星。"
    assert wrapped("他说「星星」了", 6) == "他说\n「星\n星」了"
    assert wrapped("a模型b", 3) == "a模\n型b"


def test_a_word_that_no_line_can_hold_is_written_in_one_piece_as_it_comes():
    address = "https://example.com/0123456789"
    writes = []
    lines = WordWrap(writes.append, lambda: 10)
    lines.add("see https://exa")
    assert "".join(writes) == "see\nhttps://exa"
    lines.add("mple.com/0123456789 and")
    lines.rest()
    assert "".join(writes) == f"see\n{address}\nand"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("width", [12, 31, 200])
def test_pieces_do_not_matter_and_only_line_ends_are_changed(text, width):
    rng = random.Random(len(text) * width)
    whole = wrap(text, width)
    assert "".join(whole.split()) == "".join(text.split())
    assert all(wrapped(cut(text, rng), width) == whole for _ in range(5))
    assert whole == text or width < 200
    for line in whole.split("\n"):
        for broken in broken_by_the_terminal(line.expandtabs(), width):
            assert cell_len(broken) > width, f"{broken!r} of {line!r}"
            assert broken.isascii(), f"{broken!r} of {line!r}"


def broken_by_the_terminal(line, width):
    """The words, or spaces, inside which a terminal of this width goes to its next row."""
    column = 0
    for word in re.findall(r"(?:\S|\xa0)+|[^\S\xa0]+", line):
        if column + cell_len(word) > width:
            yield word
        column = (column + cell_len(word) - 1) % width + 1


def test_characters_of_several_parts_stay_whole():
    family, wave, flag, accent = "👨‍👩‍👧", "👋🏽", "🇩🇪", "e\u0301"
    for part in (family, wave, flag):
        lines = wrapped(part * 4, 5).split("\n")
        assert "".join(lines) == part * 4
        assert all(line.replace(part, "") == "" for line in lines)
    assert wrapped(accent * 8, 4) == accent * 8, "one word"


def test_the_width_is_that_of_the_moment():
    widths = iter([40] * 3 + [9] * 100)
    text = wrapped(["one two three ", "four five six seven eight"], lambda: next(widths))
    assert max(map(len, text.split("\n")[1:])) <= 9
    assert text.replace("\n", " ") == "one two three four five six seven eight"
