"""Counts of rows, and what they foretell, against numbers worked out by hand or read from the real loader."""

from __future__ import annotations

import numpy as np
import pytest

from minimind_v.core.curate import stats
from minimind_v.core.curate.count import language
from minimind_v.core.curate.summary import summary
from minimind_v.core.data.dataset import RowDataset
from minimind_v.core.data.loader import BatchPlan, load_batches
from minimind_v.core.errors import DataError
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.rows.subset import SampledRows
from tests.curate.made import SPEC, TROUBLE, encoder, recipe, talk, write


def time_of(*given):
    return {"seconds": 12.0, "how": "a guess"}


def stats_of(data, config=None, limit=None):
    return stats.describe_rows(open_rows(data, data.parent / "t_images"), encoder(), config or recipe(), time_of, limit)


def test_counts_of_whole_rows(tmp_path):
    rows = [{"conversations": talk(*["why", "so"] * n)} for n in (1, 2, 3)]
    rows.append({"conversations": talk("<image>\nwhat <image>", "red"), "image": "wide.png, square.png"})
    report = stats_of(write(tmp_path, rows))
    prompts = encoder()
    lengths = [len(prompts.row(row["conversations"], 2 if "image" in row else 0, 10**6)) for row in rows]
    assert report["rows"] == report["looked_at"] == 4
    assert not report["sample"]
    assert report["turns"]["sum"] == 1 + 2 + 3 + 1
    assert (report["turns"]["min"], report["turns"]["max"]) == (1, 3)
    assert report["images"]["sum"] == 2
    assert report["tokens"]["images"]["sum"] == 2 * SPEC.tokens_per_image
    assert report["tokens"]["total"]["sum"] == sum(lengths)
    assert sum(report["tokens"][group]["sum"] for group in ("prompt", "answers", "images")) == sum(lengths)
    assert sum(report["histogram"]["counts"]) == 4
    assert report["skipped"]["rows"] == report["cut"]["rows"] == 0


def test_padding_is_that_of_the_batches_which_training_reads(tmp_path):
    rows = [{"conversations": talk("why " * (n * 7 % 31), "so " * (n % 13 + 1))} for n in range(150)]
    data, config = write(tmp_path, rows), recipe(max_length=60)
    report = stats_of(data, config)
    dataset = RowDataset(open_rows(data), encoder(), SPEC.image_size, 60)
    batches = list(load_batches(BatchPlan(dataset, 4, 0, config.seed), 0))
    kept = sum(int(batch.attention_mask.sum()) for batch in batches)
    padded = sum(batch.attention_mask.numel() for batch in batches)
    used = sum(map(len, batches))
    assert report["padding"]["batches"] == pytest.approx(1 - kept / padded)
    assert report["padding"]["fixed"] == pytest.approx(1 - kept / (used * 60))
    assert report["skipped"]["rows"] == sum(len(batch.broken) for batch in batches)
    assert report["cut"]["rows"] > 0
    supervised = sum(batch.supervised for batch in batches)
    assert report["training"]["supervised_tokens"] == supervised * 2


@pytest.mark.parametrize(("rows", "batch", "accumulate", "steps"), [(10, 4, 1, 6), (10, 4, 2, 4), (8, 4, 2, 2)])
def test_steps_are_those_of_a_run(tmp_path, rows, batch, accumulate, steps):
    data = write(tmp_path, [{"conversations": talk("a", "b")}] * rows)
    assert stats_of(data, recipe(batch_size=batch, accumulate=accumulate))["training"]["updates"] == steps


def test_what_truncation_takes(tmp_path):
    prompts = encoder()
    short, long = talk("a", "b"), talk("a", "b", "c", "d e f")
    length = len(prompts.row(short, 0, 10**6))
    answers = [sum(prompts.row(row, 0, 10**6).loss_mask) for row in (short, long)]
    report = stats_of(write(tmp_path, [{"conversations": short}, {"conversations": long}]), recipe(max_length=length))
    assert report["cut"]["rows"] == 1
    assert report["cut"]["turns"] == 1
    assert report["cut"]["answer_tokens"] == answers[1] - answers[0]
    one_less = stats_of(tmp_path / "t_data.jsonl", recipe(max_length=length - 1))
    assert one_less["cut"]["rows"] == 2
    assert one_less["cut"]["answer_tokens"] == answers[1] - answers[0] + 2


def test_broken_rows_are_counted_by_kind(tmp_path):
    report = stats_of(write(tmp_path, TROUBLE))
    kinds = {"json": 1, "conversations": 1, "placeholders": 1, "no answer": 1, "too long": 1}
    assert report["skipped"]["kinds"] == kinds
    assert report["skipped"]["first"]["json"].startswith(f"{tmp_path / 't_data.jsonl'}:2: ")
    assert report["skipped"]["refused"]
    assert report["tokens"]["total"]["max"] > 1536  # the row that is too long counts with its whole length


def test_no_row_that_can_be_used(tmp_path):
    with pytest.raises(DataError, match=r"none of 2 rows .*t_data.jsonl:1"):
        stats_of(write(tmp_path, ["{", "["]))


def test_a_sample_is_the_beginning_of_the_first_epoch(tmp_path):
    rows = [{"conversations": talk("why " * (n % 9), "so")} for n in range(200)]
    data = write(tmp_path, rows)
    report, again = stats_of(data, limit=50), stats_of(data, limit=50)
    assert report == again
    assert (report["rows"], report["looked_at"], report["sample"]) == (200, 50, True)
    assert report["training"]["updates"] == 2 * 50  # of all rows
    store = open_rows(data)
    order = BatchPlan(RowDataset(store, encoder(), 0, 99), 4, 0, recipe().seed).order(0)[:50]
    lengths = [len(encoder().row(store.row(int(n)).conversations, 0, 10**6)) for n in order]
    assert report["tokens"]["total"]["sum"] == sum(lengths)
    sampled = SampledRows(store, order)
    assert len(sampled) == 50
    assert sampled.location(3) == store.location(int(order[3]))
    assert sampled.number(3) == order[3] + 1
    assert (sampled.shuffled(np.random.default_rng(0)) == np.arange(50)).all()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("What is in this picture?", "English"),
        ("这张图片里有什么？ OK", "Chinese"),
        ("图片 shows 一只 cat on 桌子 today", "mixed"),
        ("Что на этой картинке?", "other"),
        ("これはとてもかわいいねこです", "other"),
        ("123 <image> …", "other"),
    ],
)
def test_language(text, name):
    assert language(talk(text)) == name


def test_language_of_nonsense():
    assert language("x") == language([3, {"content": 5}]) == "other"


def test_histogram_has_round_edges_and_every_value():
    values = [*range(100, 700), 50_000]
    histogram = stats.histogram(values)
    assert sum(histogram["counts"]) == len(values)
    assert len(histogram["counts"]) <= stats.BINS
    assert histogram["edges"][0] <= 100
    assert all(edge % 50 == 0 for edge in histogram["edges"])
    assert histogram["edges"][-1] < 1000  # one giant does not flatten all others
    assert stats.histogram([7, 7])["counts"] == [2]


def test_text_rows_have_no_pictures_and_are_counted(tmp_path):
    rows = [{"conversations": talk("<image>?", "A rose."), "image": "wide.png"}] * 3
    rows.append({"conversations": talk("?", "A rose."), "image": "wide.png"})
    rows.append({"conversations": talk("?", "No."), "img": "a"})
    report = stats_of(write(tmp_path, rows))
    assert (report["text_rows"], report["images"]["sum"]) == (1, 3)
    assert report["skipped"]["kinds"] == {"images not read": 1}
    assert "1 of 5 rows have an image but no <image> in their text" in summary(report)["text rows"]
