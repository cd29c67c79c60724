"""Rows joined with their pictures: what is broken is named and left out, what is whole is right."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch

from minimind_v.core.data.batch import collate
from minimind_v.core.data.dataset import BrokenRow, Example, LoadedImage, RowDataset
from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.errors import RowError
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.rows.stores import open_rows
from tests.rows.made import PATCHES, SIZE, picture, pixels_of, png_header, row, shade

WHOLE = row("<image>\nWhat?", "A dog.", "7.png")
BROKEN = {  # kind → lines of the file that are broken in this way
    "json": [b"{", b"\xff\xfe", b"[]", b'{"a":' + b"9" * 5000 + b"}", b"[" * 50_000],
    "conversations": [
        b"{}",
        b'{"conversations":3}',
        row(3, "b"),
        row("a", None),
        row("a\ud800", "b"),
        row("a", "b\udc00"),
    ],
    "roles": [b'{"conversations":[{"role":"x","content":"a"}]}', row("a", "b", roles=("user", "user"))],
    "no answer": [b'{"conversations":[{"role":"user","content":"a"}]}'],
    "placeholders": [row("<image>", "b"), row("<image><image>", "b", "7.png"), row("<image>", "b", "7.png, 8.png")],
    "image": [row("<image>", "b", [7]), row("<image>", "b", "a\nb.png"), row("<image>", "b", "\ud800.png")],
    "too long": [row("long " * 200, "b"), row("<image>" * 30, "b", ", ".join(["7.png"] * 30))],
    "image missing": [
        row("<image>", "b", "none.png"),
        row("<image>", "b", "x" * 300),
        row("<image><image>", "b", "7.png, no"),
    ],
    "image broken": [row("<image>", "b", name) for name in ("empty.png", "cut.png", "page.html")],
    "image too large": [row("<image>", "b", "bomb.png")],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.zip"
    odd = {
        "empty.png": b"",
        "cut.png": picture(3)[:-30],
        "page.html": b"<!DOCTYPE html>",
        "bomb.png": png_header(60_000, 60_000),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in ({f"{n}.png": picture(n) for n in range(20)} | odd).items():
            archive.writestr(f"images/{name}", data)
    return path


@pytest.fixture
def dataset(tmp_path, demo_tokenizer, images):
    def make(lines, max_length=100, pictures=images, blank=False) -> RowDataset:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"\n".join(lines))
        encoder = PromptEncoder(demo_tokenizer, PATCHES)
        return RowDataset(open_rows(path, pictures), encoder, SIZE, max_length, blank)

    return make


def read(dataset, index) -> Example | BrokenRow:
    example = dataset.text(index)
    return example if isinstance(example, BrokenRow) else dataset.load(example)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_is_named_and_its_neighbours_are_whole(dataset, kind):
    for line in BROKEN[kind]:
        rows = dataset([WHOLE, b"", line, WHOLE])
        results = [read(rows, index) for index in range(3)]
        assert isinstance(results[1], BrokenRow), line[:80]
        assert results[1].kind == kind, results[1]
        assert results[1].location == f"{rows.rows.path}:3"
        assert str(results[1]).startswith(f"{rows.rows.path}:3: ")
        assert "\n" not in str(results[1])
        str(results[1]).encode("utf-8")
        assert pickle.loads(pickle.dumps(results[1])) == results[1]
        for index in (0, 2):
            assert isinstance(results[index], Example)
            assert pixels_of(results[index])[0, :, 0, 0].tolist() == shade(7)


def test_a_whole_row(dataset, demo_tokenizer):
    rows = dataset([row("<image> and <image>", "Both.", " 5.png , images/11.png"), row("Hi", "Yes", "")])
    example = read(rows, 0)
    assert example.location.endswith("rows.jsonl:1")
    assert example.names == ["5.png", "images/11.png"]
    assert pixels_of(example).shape == (2, 3, SIZE, SIZE)
    assert pixels_of(example).dtype == np.uint8
    assert pixels_of(example)[:, :, 3, 3].tolist() == [shade(5), shade(11)]
    assert example.tokens == rows.encoder.row(rows.rows.row(0).conversations, 2, 100)
    text = read(rows, 1)
    assert text.images == []
    assert text.names == []


@pytest.mark.parametrize("image", [None, "", " ", ","])
def test_a_row_without_a_picture(dataset, image):
    line = {"conversations": json.loads(row("Hi", "Yes"))["conversations"], "image": image}
    rows = dataset([json.dumps(line).encode()], pictures=None)
    assert isinstance(read(rows, 0), Example)
    assert read(rows, 0).images == []


def test_pictures_of_turns_that_were_cut_away_are_not_read(dataset):
    talk = (
        json.loads(row("<image>a", "b"))["conversations"]
        + json.loads(row("<image>" + "long " * 50, "b"))["conversations"]
    )
    line = json.dumps({"conversations": talk, "image": "4.png, none.png"}).encode()
    example = read(dataset([line], max_length=60), 0)
    assert isinstance(example, Example)
    assert example.names == ["4.png"]
    assert pixels_of(example)[:, :, 0, 0].tolist() == [shade(4)]
    assert read(dataset([line], max_length=1000), 0).kind == "image missing"


def test_a_last_question_goes_with_its_picture(dataset):
    talk = [*json.loads(row("<image>a", "b"))["conversations"], {"role": "user", "content": "<image>?"}]
    line = json.dumps({"conversations": talk, "image": "4.png, none.png"}).encode()
    assert read(dataset([line]), 0).names == ["4.png"]


def test_without_pictures_a_row_with_one_says_which_option_is_missing(dataset):
    broken_row = read(dataset([WHOLE], pictures=None), 0)
    assert broken_row.kind == "image missing"
    assert "--images" in broken_row.message


def test_blank_pictures_need_no_files(dataset):
    rows = dataset([row("<image>", "b", "none.png")], pictures=None, blank=True)
    assert (pixels_of(read(rows, 0)) == 128).all()


def test_a_dataset_can_be_sent_to_another_process(dataset):
    rows = dataset([WHOLE, row("a<|im_end|>b", "c"), b"{"])
    before = [read(rows, index) for index in range(3)]
    twin = pickle.loads(pickle.dumps(rows))
    after = [read(twin, index) for index in range(3)]
    assert [item.tokens for item in before[:2]] == [item.tokens for item in after[:2]]
    assert (pixels_of(before[0]) == pixels_of(after[0])).all()
    assert before[2] == after[2]


def test_a_row_error_keeps_its_kind_on_the_way_home():
    error = pickle.loads(pickle.dumps(RowError("what", "kind")))
    assert (str(error), error.kind) == ("what", "kind")


# --- side by side -----------------------------------------------------------------------------------------------------


def example(length, number, pictures=0) -> Example:
    ids = [number * 100 + n for n in range(length)]
    tokens = Tokens(ids, [n % 3 == 1 for n in range(length)], [n < pictures for n in range(length)], pictures)
    shown = [LoadedImage(b"", np.full((3, SIZE, SIZE), number, np.uint8)) for _ in range(pictures)]
    return Example(number, f"f:{number}", tokens, [], shown)


def test_a_batch_is_as_long_as_its_longest_row():
    examples = [example(4, 1, 1), example(7, 2), example(3, 3, 2)]
    broken = [BrokenRow("f:9", "json", "no")]
    batch = collate(examples, broken, pad_id=9)
    assert len(batch) == 3
    assert batch.input_ids.shape == (3, 7)
    assert batch.locations == ["f:1", "f:2", "f:3"]
    assert batch.broken == broken
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1, 3, 3], "pictures in reading order"
    assert batch.pixel_values.dtype == torch.uint8
    for n, item in enumerate(examples):
        length = len(item.tokens)
        assert batch.input_ids[n].tolist() == item.tokens.input_ids + [9] * (7 - length)
        assert batch.attention_mask[n].tolist() == [True] * length + [False] * (7 - length)
        assert batch.image_mask[n].tolist() == item.tokens.image_mask + [False] * (7 - length)
        taught = [i if m else IGNORE for i, m in zip(item.tokens.input_ids, item.tokens.loss_mask, strict=True)]
        assert batch.labels[n].tolist() == taught + [IGNORE] * (7 - length)
    assert batch.supervised == sum(sum(item.tokens.loss_mask[1:]) for item in examples)
    assert torch.equal(batch.input_ids.flatten()[batch.supervised_positions + 1], batch.targets)
    assert len(batch.targets) == batch.supervised
    assert torch.equal(batch.image_mask.flatten().nonzero()[:, 0], batch.image_positions)


def test_rows_with_placeholders_for_other_images_than_their_own_are_refused():
    wrong = example(4, 2, 1)
    wrong.images *= 2
    with pytest.raises(ValueError, match="f:1: 1 for 1, f:2: 1 for 2"):
        collate([example(4, 1, 1), wrong], [], 0)


def test_stored_and_decoded_images_stay_in_reading_order():
    row = example(5, 1, 4)
    for n in (1, 3):
        row.images[n] = LoadedImage(b"", features=torch.full((1, 2), n))
    batch = collate([row], [], 0)
    pixels = torch.tensor([0, 2])[:, None, None].expand(-1, 1, 2)
    order = torch.cat((batch.image_features, pixels)).index_select(0, batch.image_order)
    assert order[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_batch_without_pictures_and_a_batch_without_rows():
    assert collate([example(3, 1)], [], 0).pixel_values is None
    empty = collate([], [BrokenRow("f:1", "json", "no")], 0)
    assert len(empty) == 0
    assert empty.supervised == 0
    assert empty.pixel_values is None
    assert len(empty.broken) == 1
    assert empty.input_ids.dtype == empty.labels.dtype == torch.int64


def test_a_batch_moves_as_a_whole():
    batch = collate([example(4, 1, 1), example(2, 2)], [], 0)
    moved = batch.to(torch.device("meta"))
    for name in ("input_ids", "attention_mask", "labels", "image_mask", "pixel_values"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert moved.locations == batch.locations
    assert moved.image_features is None
