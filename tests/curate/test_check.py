"""Every kind of trouble is named, on the right row, and nothing else is; check and training agree."""

from __future__ import annotations

import json
import os
import random
import signal
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from minimind_v.core.curate import check as checking
from minimind_v.core.curate.check import check, check_row, summary
from minimind_v.core.data.dataset import BrokenRow, RowDataset
from minimind_v.core.data.loader import BatchPlan
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.rows.stores import open_rows
from tests.rows.made import PATCHES, SIZE, picture, png_header, row


@pytest.fixture
def dataset(tmp_path, demo_tokenizer):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for n in range(20):
            archive.writestr(f"{n}.png", picture(n))
        archive.writestr("copy.png", picture(7))
        archive.writestr("cut.png", picture(3)[:-30])
        archive.writestr("page.jpg", b"<!DOCTYPE html>")
        archive.writestr("bomb.png", png_header(60_000, 60_000))

    def make(lines, name="rows.jsonl") -> RowDataset:
        (tmp_path / name).write_bytes(b"\n".join(lines))
        rows = open_rows(tmp_path / name, tmp_path / "images.zip")
        return RowDataset(rows, PromptEncoder(demo_tokenizer, PATCHES), SIZE, 100)

    return make


LINES = {
    1: (row("<image>?", "A dog.", "1.png"), []),
    2: (b"{", ["json"]),
    3: (row("<image>?", "  ", "2.png"), ["empty answer"]),
    4: (row("<image>?", " ", "none.png"), ["empty answer", "image missing"]),
    5: (row("<image>?", "b", "cut.png"), ["image broken"]),
    6: (row("<image>?", "b", "page.jpg"), ["image broken"]),
    7: (row("<image>?", "b", "bomb.png"), ["image too large"]),
    8: (row("<image><image>?", "b", "3.png"), ["placeholders"]),
    9: (row("a", "b", roles=("user", "robot")), ["roles"]),
    10: (row("a", 3), ["conversations"]),
    11: (row("a", "long " * 300), ["cut"]),
    12: (row("long " * 300, "b"), ["too long"]),
    13: (row("<image>?", "A dog.", "1.png"), ["duplicate row"]),
    14: (row("<image>!", "Other.", "1.png"), ["duplicate image"]),
    15: (row("<image><image>", "b", "none.png, cut.png"), ["image missing", "image broken"]),
    16: (json.dumps({"conversations": [{"role": "user", "content": "a"}]}).encode(), ["no answer"]),
    17: (row("a", "b", "\x00"), ["image"]),
    18: (row("what", "yes"), []),
    19: (row("<image>?", "x" * 5, "8.png"), []),
    20: (
        json.dumps({"conversations": [{"role": "user", "content": "<image>"}], "image": "1.png"}).encode(),
        ["no answer"],
    ),
}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_problem_is_named_on_its_row(dataset, workers):
    rows = dataset([line for line, _ in LINES.values()])
    steps = []
    report = check(rows, workers, progress=lambda done, total: steps.append((done, total)))
    kinds_of_row = {number: [] for number in LINES}
    for problem in report.problems():
        kinds_of_row[problem.row].append(problem.kind)
        assert problem.location == f"{rows.rows.path}:{problem.row}"
        assert "\n" not in problem.message
    assert {number: sorted(kinds) for number, kinds in kinds_of_row.items()} == {
        number: sorted(kinds) for number, (_, kinds) in LINES.items()
    }
    assert steps[-1] == (20, 20)
    result = summary(report, 0.01)
    assert result["rows"] == 20
    assert result["ok"] is False
    assert "more than 1%" in result["refusal"]
    assert result["kinds"]["cut"]["training"] == "cuts the row"
    assert sum(kind["count"] for kind in result["kinds"].values()) == sum(map(len, kinds_of_row.values()))
    assert summary(report, 1.0)["ok"]


def test_training_skips_the_very_rows_that_check_calls_broken(dataset):
    rows = dataset([line for line, _ in LINES.values()])
    report = check(rows, 1)
    read = [item if isinstance(item := rows.text(n), BrokenRow) else rows.load(item) for n in range(len(rows))]
    assert {n for n, item in enumerate(read) if isinstance(item, BrokenRow)} == set(np.flatnonzero(report.skipped))


def test_a_broken_picture_behind_the_cut_is_no_reason_to_skip(dataset):
    talk = [
        {"role": "user", "content": "<image>a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "<image>" + "long " * 200},
        {"role": "assistant", "content": "c"},
    ]
    rows = dataset([json.dumps({"conversations": talk, "image": "1.png, none.png"}).encode()])
    result = check_row(rows, 0)
    assert [kind for kind, _ in result.problems] == ["cut", "cut"]
    assert not isinstance(rows.load(rows.text(0)), BrokenRow)


def test_rows_shared_with_a_held_out_file_are_named(dataset, tmp_path):
    held = dataset([row("<image>x", "y", "copy.png"), row("text", "only")], "held.jsonl")
    rows = dataset([row("<image>?", "b", "7.png"), row("<image>?", "b", "8.png"), row("text", "only")])
    report = check(rows, 1, held.rows)
    assert [(problem.row, problem.kind) for problem in report.problems()] == [(1, "held out"), (3, "held out")]
    assert list(np.flatnonzero(report.repeated)) == [0, 2]


def test_no_usable_row_is_a_refusal_however_many_are_allowed(dataset):
    assert summary(check(dataset([b"{"] * 3), 1), 1.0)["refusal"] == "no row is usable"


def _deadly(dataset, index):
    if index == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return check_row(dataset, index)


def test_a_row_that_kills_its_process_is_named_and_the_others_are_checked(dataset, monkeypatch):
    rows = dataset([b"{" if n == 70 else row(f"q{n}", "a") for n in range(100)])
    monkeypatch.setattr(checking, "check_row", _deadly)
    report = check(rows, 1)
    assert [(problem.row, problem.kind) for problem in report.problems()] == [(41, "crash"), (71, "json")]


# --- damage of every sort ---------------------------------------------------------------------------------------------

VALUES = (None, 0, 1.5, True, "", "x", [], {}, [None], "\ud800", "<image>" * 3, "a\x00b", "../../etc/passwd", 10**400)


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes lost, bytes too many, broken off, or something else altogether."""
    at, other = sorted(rng.choices(range(len(data)), k=2))
    return rng.choice(
        [
            lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
            lambda: data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:],
            lambda: data[:at] + data[other:],
            lambda: data[:at],
            lambda: data[:at] + bytes(other - at) + data[other:],
            lambda: rng.choice([b"", b"<html>", b"version https://git-lfs", rng.randbytes(80), data + data]),
        ]
    )()


def damaged_value(rng: random.Random, value):
    """The same tree with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {name: inner for name, inner in value.items() if name != key}
        return value | {key: damaged_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], damaged_value(rng, value[at]), *value[at + 1 :]]
    return rng.choice(VALUES)


def damaged_line(rng: random.Random, number: int) -> bytes:
    line = row("<image>?", "A dog.", f"{number}.jpg").replace(b"\n", b" ")
    if rng.random() < 0.4:
        line = damaged_bytes(rng, line)
    elif rng.random() < 0.5:
        line = json.dumps(damaged_value(rng, json.loads(line))).encode()
    return line.replace(b"\n", b" ").replace(b"\r", b" ") or b"{"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("seed", range(2))
def test_of_hundreds_of_damaged_rows_check_and_training_say_the_same(tmp_path, demo_tokenizer, kind, seed):
    rng, count = random.Random(seed), 300
    pictures = [picture(n, rng.choice(["JPEG", "PNG", "WEBP", "GIF", "TIFF"])) for n in range(count)]
    pictures = [damaged_bytes(rng, data) if rng.random() < 0.5 else data for data in pictures]
    lines = [damaged_line(rng, number) for number in range(count)]
    if kind == "jsonl":
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for number, data in enumerate(pictures):
                archive.writestr(f"{number}.jpg", data)
        rows = open_rows(tmp_path / "rows.jsonl", tmp_path / "images.zip")
    else:
        texts = [b"[" + line[line.find(b"[") + 1 : line.rfind(b"]") + 1] for line in lines]
        columns = {
            "conversations": pa.array([text.decode("utf-8", "replace") for text in texts]),
            "image_bytes": pa.array(pictures, pa.binary()),
        }
        pq.write_table(pa.table(columns), tmp_path / "rows.parquet", row_group_size=70)
        rows = open_rows(tmp_path / "rows.parquet", None)
    dataset = RowDataset(rows, PromptEncoder(demo_tokenizer, PATCHES), SIZE, 100)
    report = check(dataset, 1)
    plan = BatchPlan(dataset, 7, pad_id=0, seed=seed)
    batches = [batch for number in range(len(plan)) for batch in plan[number]]
    read = [location for batch in batches for location in batch.locations]
    broken = {row.location: row.kind for batch in batches for row in batch.broken}
    assert sorted([*read, *broken]) == sorted(rows.location(index) for index in range(count))
    assert {rows.location(index) for index in np.flatnonzero(report.skipped)} == set(broken)
    assert 20 < len(broken) < count - 20
    kinds = {}
    for problem in report.problems():
        kinds.setdefault(problem.location, set()).add(problem.kind)
    assert all(kind in kinds[location] for location, kind in broken.items())
    assert len(set(broken.values())) > (4 if kind == "jsonl" else 2)


# --- pictures that are not shown --------------------------------------------------------------------------------------


def test_text_rows_are_information_and_their_pictures_are_not_decoded(dataset, tmp_path):
    held = dataset([row("Another?", "text", "page.jpg")], "held.jsonl")
    lines = [row("<image>?", "b", "1.png"), *[row(f"Number {n}?", "b", "page.jpg") for n in range(5)]]
    rows = dataset([*lines, row("Missing?", "b", "none.png")])
    report = check(rows, 1, held.rows)
    assert [(problem.row, problem.kind) for problem in report.problems()] == [(7, "unused image")]
    result = summary(report, 0.0)
    assert (result["ok"], result["usable"], result["text_rows"]["count"]) == (True, 7, 6)
    assert result["text_rows"]["first"][0] == f"{rows.rows.path}:2"
    assert result["text_rows"]["message"].startswith("6 of 7 rows have an image but no <image> in their text")
    assert not report.repeated.any(), "a black picture that fills a column makes no row a copy of another"
    assert list(np.flatnonzero(~report.whole)) == [6], "what cannot be copied"


def test_pictures_that_are_not_read_are_a_kind_of_their_own(dataset):
    plain = json.loads(row("What?", "b"))
    lines = [
        plain | {"img": ["1.png"]},
        plain | {"video": "a.mp4"},
        json.loads(row("<img>1.png</img>?", "b")),
        plain,
    ]
    result = summary(check(dataset([json.dumps(line).encode() for line in lines]), 1), 0.01)
    assert result["kinds"]["images not read"]["count"] == 3
    assert result["kinds"]["images not read"]["training"] == "skips the row"
    assert (result["usable"], result["ok"]) == (1, False)
    assert result["text_rows"] == {"count": 0, "first": [], "message": ""}


def test_dark_ink_on_transparency_is_named_and_trained_on(dataset, tmp_path):
    ink, light, opaque = (Image.new("RGBA", (40, 40), colour) for colour in ((0, 0, 0, 0), (0, 0, 0, 0), "black"))
    ink.paste((10, 10, 10, 255), (5, 5, 30, 12))
    light.paste((250, 250, 250, 255), (5, 5, 30, 12))
    on_white = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    on_white.paste((10, 10, 10, 255), (5, 5, 30, 12))
    drawings = {"ink": ink, "light": light, "opaque": opaque, "white": on_white, "grey": ink.convert("LA")}
    (tmp_path / "drawn").mkdir()
    for name, drawing in drawings.items():
        drawing.save(tmp_path / "drawn" / f"{name}.png")
    ink.save(tmp_path / "drawn" / "ink.webp", lossless=True)
    lines = [row("<image>?", name, f"{name}.png") for name in drawings] + [row("<image>?", "webp", "ink.webp")]
    (tmp_path / "drawn.jsonl").write_bytes(b"\n".join(lines))
    rows = RowDataset(
        open_rows(tmp_path / "drawn.jsonl", tmp_path / "drawn"), dataset([LINES[1][0]]).encoder, SIZE, 100
    )
    report = check(rows, 1)
    assert [(problem.row, problem.kind) for problem in report.problems()] == [
        (number, "dark on transparent") for number in (1, 5, 6)
    ]
    assert not report.skipped.any()
