"""Kept tokens: each row is tokenised once whoever reads it, and nothing that is stale, half or damaged is believed."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import random
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind_v.core.data import token_store
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.dataset import BrokenRow, Example, RowDataset
from minimind_v.core.data.loader import LANES, WINDOW, BatchPlan, _lanes, load_steps
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.token_store import TokenStore, keep_tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.rows.stores import open_rows
from tests.cli.harness import run_mmv, tiny_data
from tests.data.conftest import TOKENIZERS
from tests.rows.made import PATCHES, SIZE, picture, row

PAD = 0


def some_lines(count, seed=0):
    """Rows of many lengths, some with pictures; every ninth is broken in one of four ways."""
    rng, lines = random.Random(seed), []
    for n in range(count):
        shown = [f"{rng.randrange(9)}.png" for _ in range(rng.choice((0, 0, 1, 2)))]
        lines.append(row("<image>" * len(shown) + "word " * rng.randint(0, 40), f"row {n} à 日 @@", ", ".join(shown)))
    for n in range(4, count, 9):
        bad = [b"{", row("a", "b", roles=("user", "user")), row("<image>", "b"), row("long " * 200, "b")]
        lines[n] = bad[n % 4]
    return lines


def write(folder: Path, lines, name="rows.jsonl") -> Path:
    (folder / name).write_bytes(b"\n".join(lines))
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for n in range(9):
        (images / f"{n}.png").write_bytes(picture(n))
    return folder / name


def open_dataset(path: Path, max_length=200, patches=PATCHES, encoder=PromptEncoder) -> RowDataset:
    tokenizer = Tokenizer.load(TOKENIZERS["demo"])
    return RowDataset(open_rows(path, path.parent / "images"), encoder(tokenizer, patches), SIZE, max_length)


def keep(dataset: RowDataset, data="the data", warn=None) -> TokenStore | None:
    """The store; a test that expects no warning fails over one."""
    return keep_tokens(dataset, data, dataset.rows.path.parent / "elsewhere", warn or pytest.fail)


class Counting(PromptEncoder):
    """Writes a byte for every row that it tokenises, in whatever process."""

    count = Path()

    def row(self, *args):
        with self.count.open("ab") as file:
            file.write(b"x")
        return super().row(*args)


@pytest.fixture
def tokenised(tmp_path, monkeypatch):
    """`tokenised()`: how many rows were tokenised since it was last asked."""
    monkeypatch.setattr(Counting, "count", tmp_path / "count")

    def since() -> int:
        count = Counting.count.stat().st_size if Counting.count.exists() else 0
        Counting.count.unlink(missing_ok=True)
        return count

    return since


def fresh(dataset: RowDataset) -> list[Example | BrokenRow]:
    return [dataset.text(n) for n in range(len(dataset))]


def same_text(kept, text) -> bool:
    if isinstance(text, BrokenRow):
        return isinstance(kept, BrokenRow) and (kept.kind, kept.message) == (text.kind, text.message)
    tokens, expected = kept.tokens, text.tokens
    return (
        isinstance(kept, Example)
        and (kept.index, kept.names) == (text.index, text.names)
        and [tokens.input_ids.tolist(), tokens.loss_mask.tolist(), tokens.image_mask.tolist()]
        == [expected.input_ids, expected.loss_mask, expected.image_mask]
        and (tokens.images, tokens.answers, tokens.answers_cut)
        == (expected.images, expected.answers, expected.answers_cut)
    )


def same(left: Batch, right: Batch) -> bool:
    """Whether two batches are the same in everything, tensors to the type."""
    for name, value in left.__dict__.items():
        other = getattr(right, name)
        if isinstance(value, torch.Tensor):
            if other is None or value.dtype != other.dtype or not torch.equal(value, other):
                return False
        elif value != other:
            return False
    return True


# --- what batches are made of -----------------------------------------------------------------------------------------


def plain_steps(dataset: RowDataset, batch_size: int, seed: int, epochs: int, rows_per_step: int):
    """All updates as plainly as can be: every window is drawn where it is needed, tensors are made row by row."""
    per_epoch, texts = -(-len(dataset) // rows_per_step), fresh(dataset)
    for epoch in range(epochs):
        order = dataset.rows.shuffled(np.random.default_rng([seed, epoch]))
        for number in _lanes(per_epoch, LANES).tolist():
            window, wide = number // WINDOW, WINDOW * rows_per_step
            rows = [texts[n] for n in order[window * wide : (window + 1) * wide]]
            rows.sort(key=lambda text: len(text.tokens) if isinstance(text, Example) else 0)
            steps = [rows[begin : begin + rows_per_step] for begin in range(0, len(rows), rows_per_step)]
            np.random.default_rng([seed, epoch, window]).shuffle(steps)
            step = steps[number % WINDOW]
            rounds = -(-len(step) // batch_size)
            edges = [len(step) * cut // rounds for cut in range(rounds + 1)]
            yield [plain_batch(dataset, step[begin:end]) for begin, end in pairwise(edges)]


def plain_batch(dataset: RowDataset, texts) -> Batch:
    read = [dataset.load(text) if isinstance(text, Example) else text for text in texts]
    examples = [text for text in read if isinstance(text, Example)]
    shape = (len(examples), max((len(example.tokens) for example in examples), default=0))
    ids, labels = torch.full(shape, PAD), torch.full(shape, IGNORE)
    attention, image = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    for n, example in enumerate(examples):
        tokens, end = example.tokens, len(example.tokens)
        ids[n, :end] = torch.tensor(tokens.input_ids)
        attention[n, :end] = True
        image[n, :end] = torch.tensor(tokens.image_mask)
        labels[n, :end] = torch.where(torch.tensor(tokens.loss_mask), torch.tensor(tokens.input_ids), IGNORE)
    pixels = [torch.from_numpy(picture.pixels.copy()) for example in examples for picture in example.images]
    pairs = [(n, t) for n, row in enumerate(labels.tolist()) for t, label in enumerate(row) if t and label != IGNORE]
    return Batch(
        ids,
        attention,
        labels,
        image,
        torch.stack(pixels) if pixels else None,
        keys=[b""] * len(pixels),
        locations=[example.location for example in examples],
        broken=[text for text in read if isinstance(text, BrokenRow)],
        answers=sum(example.tokens.answers for example in examples),
        answers_cut=sum(example.tokens.answers_cut for example in examples),
        image_positions=image.flatten().nonzero().flatten(),
        supervised_positions=torch.tensor([n * shape[1] + t - 1 for n, t in pairs], dtype=torch.int64),
        targets=torch.tensor([ids[n, t] for n, t in pairs], dtype=torch.int64),
    )


@pytest.mark.long
@pytest.mark.parametrize(("batch_size", "rows_per_step"), [(4, 4), (2, 6)])
def test_batches_are_those_of_the_plain_way_for_any_number_of_workers(tmp_path, batch_size, rows_per_step):
    dataset = open_dataset(write(tmp_path, some_lines(300)))
    expected = list(plain_steps(dataset, batch_size, 3, 2, rows_per_step))
    assert sum(len(batch.broken) for step in expected for batch in step) > 50
    for tokens, workers, start in ((None, 0, 0), (keep(dataset), 3, 0), (keep(dataset), 0, 0), (keep(dataset), 2, 41)):
        plan = BatchPlan(dataset, batch_size, PAD, 3, 2, rows_per_step=rows_per_step, tokens=tokens)
        steps = list(load_steps(plan, workers, start=start))
        assert len(steps) == len(expected) - start
        for step, other in zip(steps, expected[start:], strict=True):
            assert len(step) == len(other)
            assert all(same(left, right) for left, right in zip(step, other, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7, 16])
def test_every_row_is_tokenised_once_whatever_the_number_of_workers(tmp_path, tokenised, workers):
    dataset = open_dataset(write(tmp_path, some_lines(300)), encoder=Counting)
    reaching = len([text for text in fresh(dataset) if getattr(text, "kind", "") != "json"])  # others are no rows yet
    tokenised()
    for epochs, times in ((2, 1), (3, 0)):  # a second run finds everything
        plan = BatchPlan(dataset, 4, PAD, 1, epochs, tokens=keep(dataset))
        assert sum(1 for _ in load_steps(plan, workers)) == epochs * 75
        assert tokenised() == times * reaching


def test_without_a_seed_no_worker_tokenises_for_another(tmp_path, tokenised):
    dataset = open_dataset(write(tmp_path, [row("word " * (n % 9), "b") for n in range(400)]), encoder=Counting)
    assert sum(1 for _ in load_steps(BatchPlan(dataset, 4, PAD), 3)) == 100
    assert tokenised() == 400


@pytest.mark.parametrize("lines", [some_lines(60), [row("a", "b")], [b"{"] * 3])
def test_what_is_kept_is_what_was_tokenised(tmp_path, lines):
    dataset = open_dataset(write(tmp_path, lines))
    store, texts = keep(dataset), fresh(dataset)
    lengths, loose = store.lengths(np.arange(len(dataset)), dataset.text)
    assert loose == {}
    assert lengths.tolist() == [len(text.tokens) if isinstance(text, Example) else 0 for text in texts]
    for reader in (store, keep(dataset), pickle.loads(pickle.dumps(store))):
        kept = reader.read(np.arange(len(dataset)))
        assert all(same_text(kept[n], text) for n, text in enumerate(texts))
    assert len(pickle.dumps(store)) < 1000


def test_large_vocabularies_are_kept_whole(tmp_path):
    dataset = open_dataset(write(tmp_path, some_lines(3)))
    text = dataset.text(0)
    text.tokens.input_ids[-1] = 150_000
    store = TokenStore(tmp_path / "kept.bin", 3, b"x", wide=True)
    store.lengths(np.array([0]), lambda index: text)
    assert same_text(store.read(np.array([0]))[0], text)


# --- stale files ------------------------------------------------------------------------------------------------------


def fill(dataset: RowDataset, data="the data") -> TokenStore:
    store = keep(dataset, data)
    store.lengths(np.arange(len(dataset)), dataset.text)
    return store


def test_tokens_of_other_settings_are_not_used(tmp_path, monkeypatch):
    path = write(tmp_path, some_lines(30))
    fill(open_dataset(path))
    assert len(keep(open_dataset(path)).read(np.arange(30))) == 30
    other = json.loads((TOKENIZERS["demo"] / "tokenizer.json").read_text())
    other["model"]["merges"] = other["model"]["merges"][:-9]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    changed = open_dataset(path)
    changed.encoder = PromptEncoder(Tokenizer.load(tmp_path), PATCHES)
    for dataset in (open_dataset(path, max_length=99), open_dataset(path, patches=5), changed):
        assert keep(dataset).read(np.arange(30)) == {}
    monkeypatch.setattr(token_store.tokenizers, "__version__", "99.0")
    assert keep(open_dataset(path)).read(np.arange(30)) == {}


def test_tokens_of_other_data_are_not_used_even_where_size_and_time_are_the_same(tmp_path):
    lines = some_lines(30)
    path = write(tmp_path, lines)
    fill(open_dataset(path), "before")
    then = path.stat()
    path.write_bytes(path.read_bytes().replace(b"word", b"bird"))
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert path.stat().st_size == then.st_size
    store = fill(open_dataset(path), "after")
    texts = fresh(open_dataset(path))
    assert all(same_text(text, texts[n]) for n, text in store.read(np.arange(30)).items())
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns + 10**9))  # of a large file `data` may not tell all
    assert keep(open_dataset(path), "after").read(np.arange(30)) == {}
    assert len(list(tmp_path.glob(".*tokens*"))) == 1, "what can never be used again is replaced"


def test_code_that_makes_other_tokens_does_not_use_these(tmp_path, monkeypatch):
    dataset = open_dataset(write(tmp_path, some_lines(3)))
    before = token_store.identify(dataset, "")
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + b"#" * (path.name == "prompt.py"))
    assert token_store.identify(dataset, "")[0] != before[0]


def test_of_many_settings_the_files_used_last_are_kept(tmp_path):
    path = write(tmp_path, some_lines(3))
    for number, length in enumerate((100, 110, 120, 130, 100, 140)):
        store = keep(open_dataset(path, length))
        os.utime(store.path, (number, number))
    left = sorted(tmp_path.glob(".*tokens*"))
    assert len(left) == token_store.MOST
    assert {keep(open_dataset(path, length)).path for length in (100, 120, 130, 140)} == set(left)
    assert sorted(tmp_path.glob(".*tokens*")) == left


@pytest.mark.long
def test_a_damaged_file_gives_no_wrong_tokens(tmp_path):
    dataset = open_dataset(write(tmp_path, some_lines(40)))
    texts, rng, rows = fresh(dataset), random.Random(0), np.arange(40)
    whole = fill(dataset).path.read_bytes()
    lost = 0
    for _ in range(150):
        path, damaged = keep(dataset).path, bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        begin, end = sorted(rng.choices(range(len(damaged)), k=2))
        if rng.random() < 0.3:
            damaged[begin:end] = bytes(end - begin)
        elif rng.random() < 0.3:
            del damaged[end:]
        path.write_bytes(damaged)
        store = keep(dataset)
        kept = store.read(rows)
        lost += 40 - len(kept)
        assert all(same_text(text, texts[n]) for n, text in kept.items())
        lengths, _ = store.lengths(rows, dataset.text)
        assert lengths.tolist() == [len(text.tokens) if isinstance(text, Example) else 0 for text in texts]
    assert lost > 500


# --- several processes ------------------------------------------------------------------------------------------------


def fill_shuffled(path: Path, seed: int, begun: Connection) -> None:
    dataset = open_dataset(path)
    store, order = keep(dataset), np.random.default_rng(seed).permutation(len(dataset))
    begun.send(True)
    for begin in range(0, len(order), 64):
        store.lengths(order[begin : begin + 64], dataset.text)


def filler(path: Path, seed: int) -> Process:
    """A process that has begun to fill the store."""
    begun, to_parent = Pipe(duplex=False)
    process = Process(target=fill_shuffled, args=(path, seed, to_parent))
    process.start()
    assert begun.recv()
    return process


@pytest.mark.long
def test_writers_that_are_killed_leave_nothing_wrong(tmp_path):
    path = write(tmp_path, some_lines(2000))
    dataset = open_dataset(path)
    texts, rows, rng, most = fresh(dataset), np.arange(2000), random.Random(0), 0
    for seed in range(3):
        two = [filler(path, 2 * seed), filler(path, 2 * seed + 1)]
        time.sleep(rng.uniform(0.02, 0.4))
        for process in two:
            process.kill()
            process.join()
        kept = keep(dataset).read(rows)
        assert all(same_text(text, texts[n]) for n, text in kept.items())
        assert len(kept) >= most, "what one has left the next one goes on from"
        most = len(kept)
    assert most > 0
    lengths, loose = keep(dataset).lengths(rows, dataset.text)
    assert loose == {}
    assert lengths.tolist() == [len(text.tokens) if isinstance(text, Example) else 0 for text in texts]


def test_runs_beside_each_other_have_the_same_tokens(tmp_path):
    path = write(tmp_path, some_lines(600))
    runs = [filler(path, seed) for seed in range(2)]
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0]
    dataset = open_dataset(path)
    kept = keep(dataset).read(np.arange(600))
    assert all(same_text(kept[n], text) for n, text in enumerate(fresh(dataset)))


HOLDING = """
import fcntl, sys, time
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_who_stops_in_the_middle_of_a_chunk_holds_up_nobody(tmp_path, monkeypatch):
    dataset = open_dataset(write(tmp_path, some_lines(40)))
    store = keep(dataset)
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, store.path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    monkeypatch.setattr(token_store, "PATIENCE", 0.2)
    begun = time.monotonic()
    lengths, loose = store.lengths(np.arange(40), dataset.text)
    assert 0.2 < time.monotonic() - begun < 10
    assert loose == {}
    assert (lengths > 0).any()
    holder.kill()
    holder.wait()


def test_without_locks_rows_are_tokenised_all_the_same(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(37, "No locks available")

    dataset = open_dataset(write(tmp_path, some_lines(40)))
    store = keep(dataset)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    _, loose = store.lengths(np.arange(40), dataset.text)
    assert loose == {}
    assert len(store.read(np.arange(40))) == 40


def test_a_file_that_was_replaced_under_a_run_is_not_mixed_with_its_own(tmp_path):
    path = write(tmp_path, some_lines(30))
    store = pickle.loads(pickle.dumps(fill(open_dataset(path), "before")))
    fill(open_dataset(path), "after")
    assert store.read(np.arange(30)) == {}
    lengths, loose = store.lengths(np.arange(30), open_dataset(path).text)
    assert len(loose) == 30
    assert lengths.tolist() == [len(text.tokens) if isinstance(text, Example) else 0 for text in loose.values()]


def test_what_may_be_a_reading_error_is_not_kept(tmp_path):
    dataset = open_dataset(write(tmp_path, some_lines(3)))
    store = keep(dataset)
    lost = BrokenRow("f:1", "parquet", "damaged in f, row group 3 (Input/output error)")
    lengths, loose = store.lengths(np.array([0]), lambda index: lost)
    assert (lengths.tolist(), loose) == ([0], {0: lost})
    assert store.read(np.array([0])) == {}
    assert store.lengths(np.array([0]), dataset.text)[0].tolist() == [len(dataset.text(0).tokens)]


# --- no room, no rights -----------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 3])
def test_a_disk_that_fills_up_is_said_once_and_changes_no_bit(tmp_path, monkeypatch, workers):
    dataset = open_dataset(write(tmp_path, some_lines(600)))
    expected = list(load_steps(BatchPlan(dataset, 4, PAD, 1), 0))
    tokens = keep(dataset)
    tokens.lengths(np.arange(100), dataset.text)
    monkeypatch.setattr(token_store, "RESERVE", 2**62)
    steps = list(load_steps(BatchPlan(dataset, 4, PAD, 1, tokens=tokens), workers))
    troubles = [batch.trouble for step in steps for batch in step if batch.trouble]
    assert 1 <= len(troubles) <= max(workers, 1)
    assert "No space left on device" in troubles[0]
    assert len(set(troubles)) == 1
    for step, other in zip(steps, expected, strict=True):
        assert all(same(replace(left, trouble=""), right) for left, right in zip(step, other, strict=True))


def test_a_record_that_was_written_in_part_is_ignored(tmp_path):
    dataset = open_dataset(write(tmp_path, some_lines(100)))
    store = keep(dataset)
    store.lengths(np.arange(20), dataset.text)

    class Full:
        def write(self, data):
            return store.path.open("ab").write(data[: len(data) // 2])

    store._end = Full()
    lengths, loose = store.lengths(np.arange(100), dataset.text)
    assert set(loose) == set(range(20, 100))
    assert store.trouble == "No space left on device"
    texts = fresh(dataset)
    assert lengths.tolist() == [len(text.tokens) if isinstance(text, Example) else 0 for text in texts]
    assert set(keep(dataset).read(np.arange(100))) == set(range(20))


def refuse_folder(monkeypatch, *folders):
    real = token_store.write_atomically

    def write(path, *args):
        if path.parent in folders:
            raise token_store.RunError(f"{path}: cannot be written (Read-only file system)")
        real(path, *args)

    monkeypatch.setattr(token_store, "write_atomically", write)


def test_where_the_data_cannot_be_written_to_tokens_are_kept_elsewhere(tmp_path, monkeypatch):
    dataset = open_dataset(write(tmp_path, some_lines(20)))
    refuse_folder(monkeypatch, tmp_path)
    store = fill(dataset)
    assert store.path.parent == tmp_path / "elsewhere"
    assert list(tmp_path.glob(".*tokens*")) == []
    assert len(keep(dataset).read(np.arange(20))) == 20


def test_where_nothing_can_be_kept_it_is_said(tmp_path, monkeypatch):
    dataset, messages = open_dataset(write(tmp_path, some_lines(20))), []
    refuse_folder(monkeypatch, tmp_path, tmp_path / "elsewhere")
    assert keep(dataset, warn=messages.append) is None
    assert len(messages) == 1
    assert "Read-only file system" in messages[0]
    assert "every epoch tokenises the rows again" in messages[0]


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_second_run_tokenises_nothing_and_trains_the_same(tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_bytes(tiny_data().data("pretrain").read_bytes())
    lines = [tiny_data().train(tmp_path / name, data=data, epochs=2, workers=0) for name in ("first", "second")]
    assert run_mmv(*lines[0]).code == 0
    monkeypatch.setattr(PromptEncoder, "row", lambda *args: pytest.fail("tokenised"))
    assert run_mmv(*lines[1]).code == 0
    losses = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for path in sorted(tmp_path.glob("*/pretrain*/metrics.jsonl"))
    ]
    assert len(losses) == 2
    assert losses[0] == losses[1]


@pytest.mark.long
def test_a_run_says_once_that_it_keeps_no_tokens(tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_bytes(tiny_data().data("pretrain").read_bytes())
    real = TokenStore.__init__

    def then_no_room(self, *args):
        real(self, *args)
        monkeypatch.setattr(token_store, "RESERVE", 2**62)

    monkeypatch.setattr(TokenStore, "__init__", then_no_room)
    ended = run_mmv(*tiny_data().train(tmp_path / "out", data=data, epochs=2, workers=2))
    assert ended.code == 0
    assert ended.err.count("token ids are not cached") == 1
