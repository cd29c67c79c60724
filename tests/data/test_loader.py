"""The order of rows and the workers: every row once, the same batches for any number of workers, little padding."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing.process import BaseProcess

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from minimind_v.core.data.dataset import RowDataset
from minimind_v.core.data.loader import LANES, WINDOW, BatchPlan, _lanes, load_batches, load_steps
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.signals import StopRequest
from tests.rows.made import PATCHES, SIZE, picture, row, shade

PAD = 0


@pytest.fixture
def rows(tmp_path, demo_tokenizer):
    """`rows(lines)` is a dataset of these lines, its pictures numbered 0 … 99."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for n in range(100):
            archive.writestr(f"{n}.png", picture(n))

    def make(lines) -> RowDataset:
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
        encoder = PromptEncoder(demo_tokenizer, PATCHES)
        return RowDataset(open_rows(tmp_path / "rows.jsonl", tmp_path / "images.zip"), encoder, SIZE, 400)

    return make


def some_lines(count, seed=0):
    """Rows of many lengths with no, one or two pictures; every seventh is broken in one of four ways."""
    rng, lines = random.Random(seed), []
    for n in range(count):
        shown = [rng.randrange(100) for _ in range(rng.choice((0, 1, 1, 2)))]
        names = ", ".join(f"{p}.png" for p in shown)
        lines.append(row("<image>" * len(shown) + "word " * rng.randint(0, 30), f"row {n} shows {names}", names))
    for n in range(3, count, 7):
        bad = [b"{", b"null", row("<image>", "b", "none.png"), row("<image>" * 2, "b", "1.png")]
        lines[n] = bad[n % 4]
    return lines


def same(left, right) -> bool:
    """Whether two batches are the same in everything."""
    pixels = (left.pixel_values, right.pixel_values)
    return (
        all(
            torch.equal(getattr(left, k), getattr(right, k))
            for k in ("input_ids", "labels", "attention_mask", "image_mask")
        )
        and (pixels[0] is pixels[1] is None or torch.equal(*pixels))
        and left.locations == right.locations
        and left.broken == right.broken
    )


def numbers(batch) -> list[int]:
    """The row numbers of a batch, the broken ones behind."""
    return [
        int(location.rpartition(":")[2]) for location in [*batch.locations, *(row.location for row in batch.broken)]
    ]


# --- every row once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, 5, 4 * WINDOW - 1, 4 * WINDOW, 4 * WINDOW + 1, 4 * WINDOW * 2 + 5])
@pytest.mark.parametrize("seed", [None, 0, 7])
def test_every_row_comes_once_per_epoch(rows, count, seed):
    plan = BatchPlan(rows(some_lines(count)), 4, PAD, seed, epochs=3)
    assert plan.steps_per_epoch == -(-count // 4)
    assert len(plan) == 3 * plan.steps_per_epoch
    for epoch in range(3):
        batches = [plan[epoch * plan.steps_per_epoch + k][0] for k in range(plan.steps_per_epoch)]
        assert sorted(n for batch in batches for n in numbers(batch)) == list(range(1, count + 1))
        sizes = Counter(len(batch) + len(batch.broken) for batch in batches)
        assert set(sizes) <= {4, count % 4 or 4}
        assert sizes[count % 4 or 4] >= 1, "at most one batch is short"


def test_without_a_seed_rows_keep_the_order_of_their_file(rows):
    plan = BatchPlan(rows([row("word " * (n * 7 % 11), f"{n}") for n in range(150)]), 4, PAD)
    assert [n for k in range(len(plan)) for n in numbers(plan[k][0])] == list(range(1, 151))


def test_an_epoch_has_its_own_order_and_the_seed_decides_it(rows):
    data = rows(some_lines(200))
    plan, twin, other = (BatchPlan(data, 4, PAD, seed, epochs=2) for seed in (1, 1, 2))
    sequence = [[tuple(numbers(p[k][0])) for k in range(len(p))] for p in (plan, twin, other)]
    assert sequence[0] == sequence[1]
    half = plan.steps_per_epoch
    epochs = [sequence[0][:half], sequence[0][half:], sequence[2][:half]]
    for a, b in ((0, 1), (0, 2)):
        flat = [[n for batch in epochs[i] for n in batch] for i in (a, b)]
        assert sum(left == right for left, right in zip(*flat, strict=True)) < 20
        assert len(set(epochs[a]) & set(epochs[b])) < 5, "batches hold other rows, not only in another order"
    assert not np.array_equal(plan.order(0), np.arange(200))
    assert sorted(plan.order(0)) == sorted(plan.order(1)) == list(range(200))


def test_the_order_is_not_by_length(rows):
    plan = BatchPlan(rows([row("word " * (n % 40), "x") for n in range(640)]), 4, PAD, seed=3)
    lengths = np.array([plan[k][0].input_ids.shape[1] for k in range(len(plan))])
    within = np.corrcoef(np.arange(len(lengths)) % WINDOW, lengths)[0, 1]
    assert abs(within) < 0.3, "short batches do not all come first in their window"


def test_batches_can_be_asked_for_in_any_order(rows):
    data = rows(some_lines(150))
    plan, fresh = BatchPlan(data, 4, PAD, 5, epochs=2), BatchPlan(data, 4, PAD, 5, epochs=2)
    forwards = [plan[k][0] for k in range(len(plan))]
    asked = random.Random(0).sample(range(len(plan)), len(plan))
    assert all(same(fresh[k][0], forwards[k]) for k in asked)
    assert all(same(plan[k][0], forwards[k]) for k in (0, len(plan) - 1, 0)), "nothing of an earlier reading is left"


def test_a_limit_leaves_out_all_but_the_first_rows(rows):
    data = rows(some_lines(50))
    for limit, seed in ((10, None), (10, 4), (1, 4), (50, 4), (1000, 4)):
        plan = BatchPlan(data, 4, PAD, seed, limit=limit)
        assert sorted(n for k in range(len(plan)) for n in numbers(plan[k][0])) == list(range(1, min(limit, 50) + 1))
    nothing = BatchPlan(data, 4, PAD, limit=0)
    assert len(nothing) == 0
    assert list(load_batches(nothing, 0)) == []


# --- whole rows and broken ones ---------------------------------------------------------------------------------------


def test_every_row_has_its_own_text_and_its_own_pictures(rows, demo_tokenizer):
    data = rows(some_lines(150))
    plan = BatchPlan(data, 4, PAD, seed=1)
    count = 0
    for batch in load_batches(plan, 0):
        pixels = iter(batch.pixel_values if batch.pixel_values is not None else [])
        for n, location in enumerate(batch.locations):
            number = int(location.rpartition(":")[2]) - 1
            line = data.rows.row(number)
            text = demo_tokenizer.decode(batch.input_ids[n][batch.labels[n] >= 0].tolist())
            assert text == line.conversations[1]["content"] + "\n"
            assert text.startswith(f"row {number} shows")
            for name in line.images:
                assert next(pixels)[:, 0, 0].tolist() == shade(int(name.removesuffix(".png")))
            count += 1
        assert next(pixels, None) is None
        assert batch.image_mask.sum() == PATCHES * (0 if batch.pixel_values is None else len(batch.pixel_values))
    assert count == 150 - len(range(3, 150, 7))


def test_broken_rows_are_reported_with_their_batch_in_every_epoch(rows):
    plan = BatchPlan(rows(some_lines(60)), 4, PAD, 1, epochs=2)
    for epoch in range(2):
        batches = [plan[epoch * plan.steps_per_epoch + k][0] for k in range(plan.steps_per_epoch)]
        broken = sorted(int(row.location.rpartition(":")[2]) for batch in batches for row in batch.broken)
        assert broken == list(range(4, 61, 7))


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_may_lose_all_its_rows(rows, workers):
    data = rows(
        [
            row("a", "b"),
            *[b"{"] * 4,
            *[row("<image>", "b", "none.png")] * 4,
            row("a", "b"),
            row("a", "b"),
            row("a", "b"),
        ]
    )
    batches = list(load_batches(BatchPlan(data, 4, PAD), workers))
    assert [len(batch) for batch in batches] == [1, 0, 3]
    assert [numbers(batch) for batch in batches] == [[1, 2, 3, 4], [5, 6, 7, 8], [10, 11, 12, 9]]
    assert batches[1].supervised == 0
    everything = list(load_batches(BatchPlan(rows([b"{"] * 10), 4, PAD, seed=1), workers))
    assert [len(batch) for batch in everything] == [0, 0, 0]
    assert sorted(n for batch in everything for n in numbers(batch)) == list(range(1, 11))


# --- padding ----------------------------------------------------------------------------------------------------------


def padding(plan) -> float:
    cells = tokens = 0
    for k in range(plan.steps_per_epoch):
        [batch] = plan[k]
        longest = batch.attention_mask.sum(1).max()
        assert batch.input_ids.shape[1] == longest, "padded to the longest row and no further"
        assert (batch.input_ids[~batch.attention_mask] == PAD).all()
        cells += batch.input_ids.numel()
        tokens += int(batch.attention_mask.sum())
    return 1 - tokens / cells


def test_little_of_a_batch_is_padding(rows):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4, 0.8, 1024), 1, 350).astype(int)  # half of them between 32 and 94 words
    data = rows([row("word", "a " * n) for n in lengths])
    sorted_share, plain_share = padding(BatchPlan(data, 16, PAD, seed=1)), padding(BatchPlan(data, 16, PAD))
    assert plain_share > 0.5, "lengths are spread widely"
    assert sorted_share < 0.13  # 10.9 % measured, 59.9 % in the order of the file


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("seed", [None, 3])
def test_batches_do_not_depend_on_the_number_of_workers(rows, seed):
    plan = BatchPlan(rows(some_lines(150)), 4, PAD, seed, epochs=2)
    alone = list(load_batches(plan, 0))
    assert len(alone) == len(plan) == 76
    for workers in (1, 2):
        together = list(load_batches(plan, workers))
        assert len(together) == len(alone)
        assert all(same(left, right) for left, right in zip(alone, together, strict=True))


@pytest.mark.parametrize("closed", [True, False])
def test_a_reader_that_stops_early_leaves_no_workers(rows, closed):
    before = set(multiprocessing.active_children())
    batches = load_batches(BatchPlan(rows(some_lines(150)), 4, PAD, 1, epochs=50), 2)
    next(batches)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 2
    if closed:
        batches.close()
    del batches
    for process in started:
        process.join(timeout=60)
    assert not started & set(multiprocessing.active_children())


HOLDING = """
from minimind_v.core.data.loader import load_batches
class Numbers(list):
    prefetch = 4
held = load_batches(Numbers([number] for number in range(100)), 2)
print(next(held), flush=True)
raise SystemExit(3)
"""


@pytest.mark.long
def test_a_program_that_stops_in_the_middle_of_its_batches_ends():
    done = subprocess.run([sys.executable, "-c", HOLDING], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n"
    assert done.returncode == 3


def _batch(plan, number):
    return plan[number][0]


@pytest.mark.long
def test_a_spawned_process_makes_the_same_batches(rows):
    plan = BatchPlan(rows([*some_lines(20), row("<|im_end|> and <|im_start|>", "<|im_end|>")]), 4, PAD, 1)
    batches = [plan[k][0] for k in range(len(plan))]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        spawned = list(pool.map(_batch, [plan] * len(plan), range(len(plan)), timeout=240))
    assert all(same(left, right) for left, right in zip(batches, spawned, strict=True))


@pytest.mark.parametrize("batches", [0, 1, WINDOW, 3 * WINDOW + 1, 4 * WINDOW, 13 * WINDOW - 5])
def test_workers_that_share_lanes_evenly_share_no_window(batches):
    sequence = _lanes(batches, LANES)
    assert sorted(sequence) == list(range(batches))
    count = -(-batches // WINDOW)
    even = LANES * (WINDOW * (count // LANES) - (WINDOW * count - batches))  # behind it lanes end one after the other
    for workers in (2, 4):
        windows = [set(sequence[: max(even, 0)][worker::workers] // WINDOW) for worker in range(workers)]
        assert sum(map(len, windows)) == len(set.union(*windows))


# --- what a worker inherits -------------------------------------------------------------------------------------------


class Heirloom:
    """Garbage in a cycle that notes in which process it is freed. What is on a GPU cannot be freed in a forked one."""

    def __init__(self, note):
        self.note, self.itself = note, self

    def __del__(self):
        with self.note.open("a") as file:
            file.write(f"{os.getpid()}\n")


class Collecting(Dataset):
    """Updates whose worker collects its garbage."""

    prefetch = 2

    def __len__(self):
        return 2

    def __getitem__(self, number):
        gc.collect()
        return []


def test_a_worker_frees_nothing_that_it_has_inherited(tmp_path):
    gc.disable()
    try:
        Heirloom(tmp_path / "freed")
        assert list(load_steps(Collecting(), 1)) == [[], []]
        gc.collect()
    finally:
        gc.enable()
    assert (tmp_path / "freed").read_text() == f"{os.getpid()}\n"


def test_a_stop_while_workers_start_leaves_none(rows, monkeypatch):
    """A signal between the start of a worker and the first batch once left the program waiting for that worker."""
    start, started = BaseProcess.start, []

    def start_and_stop(process):
        start(process)
        started.append(process)
        os.kill(os.getpid(), signal.SIGUSR1)

    plan = BatchPlan(rows(some_lines(20)), 4, PAD, 0)
    with StopRequest() as stop, closing(load_steps(plan, 2)) as steps:
        monkeypatch.setattr(BaseProcess, "start", start_and_stop)
        assert stop.wait(partial(next, steps)) is None
    assert stop.signal == signal.SIGUSR1
    assert len(started) == 2
    assert not any(process.is_alive() for process in started)
