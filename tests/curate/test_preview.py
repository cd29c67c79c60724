"""What a preview says of rows, and that no row can do anything to the page or the terminal."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from minimind_v.cli.data_lines import row_lines
from minimind_v.core.curate.preview import Previewer, as_json
from minimind_v.core.curate.token_text import BYTES, TokenReader, visible
from minimind_v.core.data.dataset import RowDataset
from minimind_v.core.data.images import load_pixels
from minimind_v.core.pages.preview import preview_page
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.wording import size
from tests.curate.made import ASSETS, PUBLISHED, SPEC, TROUBLE, encoder, recipe, talk, write
from tests.tokenizers_made import thinking_tokenizer


def previewer(data, config=None):
    return Previewer(open_rows(data, data.parent / "t_images"), encoder(), SPEC, config or recipe())


def views(data, config=None):
    looker = previewer(data, config)
    return [looker.view(n) for n in range(len(looker.rows))]


class Page(HTMLParser):
    """Tags, their attributes, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input", "br", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.text += data


def test_the_size_of_a_small_file_is_in_bytes():
    sizes = {1: "1 byte", 302: "302 bytes", 3602: "3.6 kB", 19_618_670: "19.6 MB"}
    assert {count: size(count) for count in sizes} == sizes


def test_every_kind_of_trouble_is_shown(tmp_path):
    shown = views(write(tmp_path, TROUBLE))
    kinds = [view.kind for view in shown]
    assert kinds == ["", "json", "conversations", "image missing", "image broken", "placeholders", "no answer", "",
                     "too long"]  # fmt: skip
    assert all(bool(view.trouble) == bool(view.kind) for view in shown)
    assert shown[7].unanswered == "nobody answers this"
    page = Page(preview_page(shown, SPEC, recipe(), "x<y"))
    assert page.text.count("Training skips this row") == 7
    assert page.text.count("skipped") == 7
    assert page.text.count("The last question has no answer, so training does not use it") == 1


def test_nothing_in_a_row_becomes_markup(tmp_path):
    text = preview_page(views(write(tmp_path, TROUBLE)), SPEC, recipe(), "</title><script>")
    page = Page(text)
    assert page.open == []  # every tag is closed, in order
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "link", "object", "form", "base"}
    assert not any(key.startswith("on") or key in ("href", "srcdoc") for _, given in page.tags for key in given)
    sources = [given["src"] for tag, given in page.tags if tag == "img"]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    policy = next(given["content"] for _, given in page.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)
    joined = page.text.replace("↵", "")
    assert "<script>alert(1)</script>" in joined  # shown as the text that it is


def test_lines_steer_no_terminal(tmp_path):
    for view in views(write(tmp_path, TROUBLE)):
        for line in row_lines(view):
            text = "".join(piece for piece, _ in line)
            assert text.isprintable(), text


def test_lines_mark_supervised_and_cut_tokens(tmp_path):
    row = {"conversations": talk("<image>\nwhy", "so it is", "and", "then")}
    data = write(tmp_path, [row | {"image": "wide.png"}])
    whole = encoder().row(row["conversations"], 1, 10**6)
    text = "\n".join("".join(piece for piece, _ in line) for line in row_lines(views(data, recipe(len(whole) - 1))[0]))
    assert "[image 1: 64 patches]↵\nwhy<|im_end|>" in text
    assert "«so it is<|im_end|>↵»" in text
    assert "[-<|im_start|>user↵" in text
    assert "67% outside the crop" in text


def test_pieces_cover_every_token_once_and_say_what_is_supervised(tmp_path):
    row = {"conversations": talk("<image>\n圆形 ok?", "是的, 𠮷!", "<image>", "b"), "image": "wide.png, square.png"}
    whole = encoder().row(row["conversations"], 2, 10**6)
    first = encoder().row(talk("<image>\n圆形 ok?", "是的, 𠮷!"), 1, 10**6)
    view = views(write(tmp_path, [row]), recipe(len(first) + 20))[0]
    assert [token for piece in view.pieces for token in piece.ids] == whole.input_ids
    assert [piece.supervised for piece in view.pieces for _ in piece.ids] == whole.loss_mask
    kept = sum(len(piece.ids) for piece in view.pieces if not piece.removed)
    assert (kept, view.whole) == (len(first), len(whole))
    assert [(piece.picture, piece.removed) for piece in view.pieces if piece.picture is not None] == [
        (0, False), (1, True)
    ]  # fmt: skip
    assert view.answers_lost == sum(whole.loss_mask) - sum(first.loss_mask)
    report = as_json(view)
    assert report["input_ids"] == first.input_ids
    begin, end = report["supervised"][0]
    assert all(first.loss_mask[begin:end])
    assert end - begin == report["supervised_tokens"] == sum(first.loss_mask)


@pytest.mark.parametrize("folder", [ASSETS, PUBLISHED], ids=["demo", "published"])
@pytest.mark.parametrize("text", ["hello  world", "你好，世界 龘𠮷", "🙂👩‍👩‍👧 é\n\n", "\x00\ufffd @@@ <|im_end|>"])
def test_pieces_read_as_the_text(folder, text):
    if not folder.is_dir():
        pytest.skip("the published tokenizer is not there")
    prompts = encoder(folder)
    tokens = prompts.row(talk(text, text), 0, 10**6)
    pieces = TokenReader(prompts.tokenizer).pieces(tokens, len(tokens), SPEC.tokens_per_image, 10**6)
    assert "".join(piece.text for piece in pieces if not piece.special).count(text) == 2
    for piece in pieces:
        assert len(piece.token_bytes) == (len(piece.ids) if len(piece.ids) > 1 else 0)
        assert "\ufffd" not in piece.text or "\ufffd" in text
    assert sum(piece.special for piece in pieces) == 2 * 3


def test_a_cut_through_a_character_shows_its_bytes(tmp_path):
    row = {"conversations": talk("a", "𠮷" * 5)}
    whole = encoder().row(row["conversations"], 0, 10**6)
    view = views(write(tmp_path, [row]), recipe(len(whole) - 5))[0]  # two of the end, three bytes of the last
    texts = [(piece.text, piece.token_bytes, piece.removed) for piece in view.pieces if piece.supervised]
    assert texts[4:-2] == [
        ("", ("F0",), False), ("", ("A0",), True), ("", ("AE",), True), ("", ("B7",), True)
    ]  # fmt: skip


def test_the_alphabet_is_that_of_the_library():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(BYTES) == set(ByteLevel.alphabet())
    assert sorted(BYTES.values()) == list(range(256))


def test_visible():
    assert visible("a\x1b[0m\n\t\u202e<b>你") == "a\\u001b[0m↵⇥\\u202e<b>你"


def test_the_picture_is_the_one_that_the_model_gets(tmp_path):
    data = write(tmp_path, [{"conversations": talk("<image>", "x"), "image": "wide.png"}])
    view = views(data)[0]
    picture = view.pictures[0]
    assert (picture.width, picture.height) == (30, 10)
    assert picture.kept == pytest.approx(1 / 3)
    page = Page(preview_page([view], SPEC, recipe(), "x"))
    source = next(given["src"] for tag, given in page.tags if given.get("src", "").startswith("data:image/png"))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    expected = load_pixels((tmp_path / "t_images" / "wide.png").read_bytes(), "wide.png", SPEC.image_size)
    assert (shown.transpose(2, 0, 1) == expected).all()
    crop = next(given for tag, given in page.tags if tag == "rect")
    assert (float(crop["x"]), float(crop["width"])) == (10, 10)


def test_padding_is_that_of_the_batch_in_the_plan(tmp_path):
    rows = [{"conversations": talk("why " * (n % 5), "so " * (n + 1))} for n in range(10)]
    looker = previewer(write(tmp_path, rows))
    row_views = [looker.view(n) for n in range(10)]
    lengths = sorted(len(view.tokens) for view in row_views)
    longest = [max(lengths[n : n + 4]) for n in range(0, 10, 4)]  # sorted by length, four in a batch
    for view in row_views:
        assert view.batch.length == next(length for length in longest if length >= len(view.tokens))


def test_choosing_rows(tmp_path):
    data = write(tmp_path, ["", *[{"conversations": talk("a", "b")}] * 30])
    looker = previewer(data)
    assert looker.choose(5, 1) == looker.choose(5, 1) != looker.choose(5, 2)
    assert looker.choose(99, 0) == list(range(30))
    assert looker.choose(3, 0, start=4) == [2, 3, 4]  # line 4 is the third row: the first line is blank
    assert looker.choose(3, 0, start=31) == [29]
    assert looker.choose(3, 0, start=32) == []


def test_a_giant_row_makes_no_giant_page(tmp_path):
    row_views = views(write(tmp_path, [{"conversations": talk("a", "word and " * 20_000)}]))
    assert row_views[0].hidden > 10_000
    page = preview_page(row_views, SPEC, recipe(), "x")
    assert len(page) < 3_000_000
    assert f"{row_views[0].hidden:,} more tokens" in page


def test_a_text_row_shows_no_picture_and_says_so(tmp_path):
    rows = [{"conversations": talk("What is red?", "A rose."), "image": "broken.jpg"}]
    (view,) = views(write(tmp_path, rows))
    assert (view.trouble, view.pictures, view.unmarked) == ("", [], 1)
    notice = "a text row: it has an image but no <image> in its text, so the model does not receive the image"
    assert notice in "\n".join("".join(text for text, _ in line) for line in row_lines(view))
    assert notice in Page(preview_page([view], SPEC, recipe(), "rows")).text
    assert (as_json(view)["used"], as_json(view)["unmarked_pictures"]) == (True, 1)


def test_a_squeezed_picture_is_shown_whole(tmp_path):
    data = write(tmp_path, [{"conversations": talk("<image>", "x"), "image": "wide.png"}])
    spec = replace(SPEC, resize_mode="squeeze", resample="bilinear")
    view = Previewer(open_rows(data, data.parent / "t_images"), encoder(), spec, recipe()).view(0)
    picture = view.pictures[0]
    assert picture.kept == as_json(view)["pictures"][0]["kept"] == 1
    shown = np.asarray(Image.open(io.BytesIO(picture.model))).transpose(2, 0, 1)
    data = (tmp_path / "t_images" / "wide.png").read_bytes()
    assert (shown == load_pixels(data, "wide.png", SPEC.image_size, "squeeze", "bilinear")).all()
    page = preview_page([view], spec, recipe(), "x")
    assert "squeezed to a square: its longer side shrinks 3.00 times as much as the other" in page
    assert "What squeezing does" in page
    assert "rect" not in [tag for tag, _ in Page(page).tags], "no crop is drawn"
    assert "squeezed to a square" in "".join(text for line in row_lines(view) for text, _ in line)


def test_rows_are_shown_in_the_form_that_training_reads(tmp_path):
    data = write(tmp_path, [{"conversations": talk("why?", "so")} for _ in range(40)])
    prompts = encoder(thinking_tokenizer(tmp_path / "tokenizer"))
    looker = Previewer(open_rows(data), prompts, SPEC, recipe())
    training = RowDataset.for_spec(looker.rows, prompts, SPEC, 1536).for_training(recipe().seed)
    shown = [looker.view(n) for n in range(40)]
    assert [view.tokens.input_ids for view in shown] == [training.text(n).tokens.input_ids for n in range(40)]
    lines = ["".join(text for line in row_lines(view) for text, _ in line) for view in shown]
    assert any("<think>" in line for line in lines)
    assert any("<think>" not in line for line in lines)
    assert any("system" in line for line in lines)
    assert all(view.batch is not None for view in shown)
