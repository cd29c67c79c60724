"""`mmv look`: in a terminal, as JSON, and as a page."""

import json
import re

import pytest
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

import minimind_v as mmv
from minimind_v.cli.look_view import heated, show_trace
from minimind_v.cli.terminal import Terminal
from tests.cli.harness import SIGHT, run_mmv

QUESTION = "What do you see?"


def run_look(*args, sighted):
    return run_mmv("look", *args, "--model", sighted, "--max-new-tokens", 6, *SIGHT)


@pytest.fixture(scope="module")
def trace(sighted, tiny_data):
    _, vision, _, tokenizer = SIGHT
    model = mmv.load(sighted, vision_model=vision, tokenizer=tokenizer)
    return model.look(QUESTION, tiny_data.picture(), max_new_tokens=6, occlusion=True)


def test_occlusion_reports_its_progress_and_the_time_left(sighted, tiny_data):
    ended = run_look(tiny_data.picture(), QUESTION, "--occlusion", sighted=sighted)
    lines = [line for line in ended.err.splitlines() if line.startswith("occlusion ")]
    assert lines[-1].startswith("occlusion 64/64, ")
    assert all(line.endswith(" s left") for line in lines)
    assert len(lines) > 4
    assert "occlusion" not in run_look(tiny_data.picture(), QUESTION, sighted=sighted).err


def test_json_is_the_trace_of_the_python_interface(sighted, tiny_data, trace):
    ended = run_look(tiny_data.picture(), QUESTION, "--json", "--occlusion", sighted=sighted)
    assert ended.json == json.loads(json.dumps(trace.as_json()))
    assert ended.json["question"] == QUESTION
    assert ended.json["model"] == str(sighted)


def test_the_answer_is_that_of_chat(sighted, tiny_data):
    chat = run_mmv(
        "chat", QUESTION, "--image", tiny_data.picture(), "--greedy", "--max-new-tokens", 6, "--model", sighted, *SIGHT
    )
    ended = run_look(tiny_data.picture(), QUESTION, "--json", sighted=sighted)
    assert ended.json["answer"] == chat.out.removesuffix("\n")


def test_text_has_the_answer_its_tokens_and_the_words_of_patches(sighted, tiny_data, trace):
    ended = run_look(tiny_data.picture(), QUESTION, "--occlusion", sighted=sighted)
    assert ended.code == 0
    assert "\x1b" not in ended.out
    lines = ended.out.splitlines()
    gain = sum(token.bits_blank - token.bits for token in trace.tokens)
    assert f"The image gives {gain:.1f} bits to this answer" in ended.out
    assert f"answer to the grey image: {trace.variants['blank'].answer}" in ended.out
    assert f"mirrored image: {trace.variants['swapped'].answer}" in ended.out
    start = lines.index("Nearest word of each patch") + 1
    words = [trace.patches[patch].nearest[0].text for patch in range(0, 64, 8)]
    for line, word in zip(lines[start : start + 8], words, strict=True):
        assert line.startswith(word[:2])
    lost = lines[lines.index("Bits that the answer loses where a patch is grey") + 1].split()
    assert [float(bits) for bits in lost] == pytest.approx(trace.occlusion[:, :8].sum(0).tolist(), abs=0.051)


@pytest.mark.parametrize("width", [40, 50, 80])
def test_a_narrow_terminal_gets_whole_words_and_numbers(trace, width):
    terminal = Terminal()
    terminal.out = Console(force_terminal=True, color_system=None, width=width, highlight=False, soft_wrap=True)
    with terminal.out.capture() as captured:
        show_trace(terminal, trace)
    lines = captured.get().splitlines()
    assert max(map(cell_len, lines)) <= width
    head = next(number for number, line in enumerate(lines) if line.startswith("token"))
    assert " ".join(" ".join(lines[:head]).split()).startswith(trace.answer.rpartition(" ")[0])
    for line, token in zip(lines[head + 1 :], trace.tokens, strict=False):
        assert f"{abs(token.gain):.2f}" in line
        assert f"{token.probability:.1%}" in line


def test_a_terminal_gets_colours_and_the_image_in_half_blocks(trace):
    terminal = Terminal()
    terminal.out = Console(
        record=True, force_terminal=True, color_system="truecolor", width=100, highlight=False, quiet=False
    )
    with terminal.out.capture() as captured:
        show_trace(terminal, trace)
    text = captured.get()
    assert text.count("▀") > 500
    assert re.search(r"\x1b\[[\d;]*48;2;", text), "the answer has no colours"


def test_an_image_glows_where_it_is_attended_to(trace):
    weights = trace.attention[0, 0, 0].reshape(8, 8) * 0
    weights[2, 5] = 1
    image = heated(trace.images[0].pixels, weights)
    assert isinstance(image, Image.Image)
    plain = trace.images[0].pixels.transpose(1, 2, 0)
    assert image.getpixel((44, 20))[0] > plain[20, 44, 0]
    assert image.getpixel((4, 60))[0] <= plain[60, 4, 0]


def test_several_images_are_rotated_and_named_ones_take_their_place(sighted, tiny_data):
    first, second = tiny_data.picture(0), tiny_data.picture(1)
    ended = run_look(first, second, QUESTION, "--json", "--answer", "a star", sighted=sighted)
    assert len(ended.json["images"]) == 2
    assert ended.json["answer"] == "a star"
    assert ended.json["variants"]["swapped"]["images"] == "rotated"
    rotated = run_look(
        first, second, QUESTION, "--json", "--answer", "a star", "--swap", second, "--swap", first, sighted=sighted
    )
    assert rotated.json["variants"]["swapped"]["images"] == "another"
    assert rotated.json["variants"]["swapped"]["bits"] == ended.json["variants"]["swapped"]["bits"]


def test_a_page_is_written_and_replaces_only_a_page(sighted, tiny_data, tmp_path):
    page, other = tmp_path / "look.html", tmp_path / "notes.html"
    for _ in range(2):
        ended = run_look(tiny_data.picture(), QUESTION, "--html", page, sighted=sighted)
        assert ended.code == 0, ended.err
    assert f"page: {page}" in ended.err
    assert QUESTION in page.read_text(encoding="utf-8")
    other.write_text("<!doctype html><p>mine</p>")
    ended = run_look(tiny_data.picture(), QUESTION, "--html", other, sighted=sighted)
    assert ended.code == 2
    assert "is not a page by mmv" in ended.error
    assert other.read_text() == "<!doctype html><p>mine</p>"
    ended = run_look(tiny_data.picture(), QUESTION, "--html", tiny_data.picture(), sighted=sighted)
    assert ended.code == 2


def test_images_are_fetched_from_web_addresses(sighted, tiny_data, web):
    address = web(tiny_data.picture().read_bytes())
    ended = run_look(address, QUESTION, "--swap", address, "--json", sighted=sighted).json
    assert ended["answer"] == run_look(tiny_data.picture(), QUESTION, "--json", sighted=sighted).json["answer"]
    refused = run_look(f"{address}/none", QUESTION, sighted=sighted)
    assert refused.error == f"{address}/none: the server answered HTTP 404 Not Found — check the address"


def test_an_empty_answer_is_refused(sighted, tiny_data):
    ended = run_look(tiny_data.picture(), QUESTION, "--answer", " ", sighted=sighted)
    assert (ended.code, ended.error) == (2, "the answer is empty — give a text, or leave it out for the model's own")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["dog.jpg"], "an image and a question are needed — mmv look dog.jpg 'What is this?'"),
        (["dog.jpg", "What", "is", "this?"], "put the question in quotes: mmv look dog.jpg 'What is this?'"),
        (["dog.jpg", " "], "the question is empty"),
        (["dog.jpg", "cat.png"], "the last argument is an image file, not a question"),
        (["dog.jpg", "What?", "--swap", "a.jpg", "--swap", "b.jpg"], "2 images for --swap and 1 of the question"),
        (["dog.jpg", "<image><image> What?"], "2 <image> marks for 1 image"),
        (["dog.jpg", "What?", "--swap", "cat.jpg"], "no image file at dog.jpg; no image file at cat.jpg"),
    ],
)
def test_what_is_missing_is_named_at_once(args, message, sighted):
    ended = run_look(*args, sighted=sighted)
    assert ended.code in (1, 2)
    assert message in ended.error
