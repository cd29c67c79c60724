"""Features on disk: what is written is found, by other processes too; what is damaged, cut or half-written is not."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from minimind_v.core.data import feature_store as store_module
from minimind_v.core.data.feature_layout import FeatureLayout
from minimind_v.core.data.feature_store import FeatureStore, digest, measure_reading
from tests.cli.harness import Running

FORM = FeatureLayout("float32", patches=4, width=8)
PLENTY = 1 << 30
STORE = "TEST_STORE"  # the variable that names the folder of a store


def key(number: int) -> bytes:
    return digest(str(number).encode())


def features(number: int, form: FeatureLayout = FORM) -> torch.Tensor:
    """Those of picture `number`, which nobody could mistake for another's."""
    return torch.randn(form.patches, form.width, generator=torch.Generator().manual_seed(number))


def fill(store: FeatureStore, numbers) -> None:
    store.write([key(n) for n in numbers], torch.stack([features(n, store.layout) for n in numbers]))


def segment_files(folder, suffix):
    return sorted(folder.glob(f"*.{suffix}"))


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    return FeatureStore(tmp_path / "features" / "eye", FORM, PLENTY)


def test_what_is_written_is_read_bit_for_bit(store):
    assert store.read(key(1)) is None
    assert not store.folder.exists(), "reading makes nothing"
    fill(store, range(10))
    fill(store, range(5, 15))
    assert store.count() == 15
    assert all(torch.equal(store.read(key(n)), features(n)) for n in range(15))
    assert store.read(key(15)) is None
    (data,) = segment_files(store.folder, "features")
    assert data.stat().st_size == 15 * FORM.record, "found on disk is not written again"


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_other_types(kind, tmp_path):
    form = FeatureLayout(kind, 4, 8)
    store = FeatureStore(tmp_path / "eye", form, PLENTY)
    fill(store, [3])
    assert torch.equal(store.read(key(3)), form.rounded(features(3)))


def test_eight_bits_are_within_half_a_level_per_token(tmp_path):
    form = FeatureLayout("int8", patches=4, width=8)
    store = FeatureStore(tmp_path / "eye", form, PLENTY)
    given = features(0, form) * torch.tensor([1e-6, 1.0, 1e4, 0.0])[:, None]  # tokens of very different size
    store.write([key(0)], given[None])
    stored = store.read(key(0))
    assert form.record == 4 * 8 + 4 * 4
    assert ((stored - given).abs() <= given.abs().amax(dim=1, keepdim=True) / 127 * 0.501).all()
    assert torch.equal(stored, form.rounded(given[None])[0]), "stored or not, the trainer gets the same"


def test_another_process_finds_what_comes_later(store):
    other = pickle.loads(pickle.dumps(store))
    fill(store, [1])
    assert torch.equal(other.read(key(1)), features(1))
    fill(store, [2])
    assert torch.equal(other.read(key(2)), features(2))


def test_more_than_fits_into_the_loose_ones(store, monkeypatch):
    monkeypatch.setattr(store_module, "LOOSE", 7)
    other = pickle.loads(pickle.dumps(store))
    for begin in range(0, 60, 4):
        fill(store, range(begin, begin + 4))
        assert torch.equal(other.read(key(begin)), features(begin))
    assert all(torch.equal(s.read(key(n)), features(n)) for n in range(60) for s in (store, other))


def _write_in_a_process(folder, first, both):
    store = FeatureStore(folder, FORM, PLENTY)
    for begin in range(first, first + 200, 4):
        fill(store, range(begin, begin + 4))
        if begin == first:
            both.wait(60)


@pytest.mark.long
def test_two_processes_write_at_once(store):
    context = multiprocessing.get_context("fork")
    both = context.Barrier(2)
    writers = [context.Process(target=_write_in_a_process, args=(store.folder, first, both)) for first in (0, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert all(torch.equal(store.read(key(n)), features(n)) for n in range(300))
    assert len(segment_files(store.folder, "index")) == 2


def write_for_ever():
    store = FeatureStore(Path(os.environ[STORE]), FORM, PLENTY)
    for begin in range(0, 10**9, 4):
        fill(store, range(begin, begin + 4))
        print("written", flush=True)


@pytest.mark.long
def test_a_kill_at_any_moment_leaves_nothing_wrong(store, tmp_path, monkeypatch):
    monkeypatch.setenv(STORE, str(store.folder))
    for pause in (0.0, 0.03, 0.1):
        writer = Running(tmp_path / str(pause), prepare=write_for_ever)
        writer.until(lambda writer=writer: "written" in writer.out)
        time.sleep(pause)
        writer.send(signal.SIGKILL).wait()
    reopened = FeatureStore(store.folder, FORM, PLENTY)
    read = {n: reopened.read(key(n)) for n in range(reopened.count() + 8)}
    assert sum(entry is not None for entry in read.values()) == reopened.count() > 0
    assert all(entry is None or torch.equal(entry, features(n)) for n, entry in read.items())
    fill(reopened, [10**6])
    assert torch.equal(reopened.read(key(10**6)), features(10**6))


@pytest.mark.parametrize("cut", [1, 20, 23, 24])
def test_half_an_entry(cut, store):
    fill(store, range(3))
    (index,) = segment_files(store.folder, "index")
    os.truncate(index, index.stat().st_size - cut)
    reopened = FeatureStore(store.folder, FORM, PLENTY)
    assert reopened.read(key(2)) is None
    assert torch.equal(reopened.read(key(1)), features(1))
    fill(reopened, [2])
    assert torch.equal(FeatureStore(store.folder, FORM, PLENTY).read(key(2)), features(2))


@pytest.mark.parametrize("at", [0, 50, FORM.record - 1])
def test_a_damaged_record_is_as_if_it_had_never_been(at, store):
    fill(store, range(3))
    (data,) = segment_files(store.folder, "features")
    with data.open("r+b") as file:
        file.seek(FORM.record + at)
        byte = file.read(1)[0]
        file.seek(FORM.record + at)
        file.write(bytes([byte ^ 4]))
    for reader in (store, FeatureStore(store.folder, FORM, PLENTY)):
        assert reader.read(key(1)) is None
        assert torch.equal(reader.read(key(2)), features(2))
    fill(store, [1])
    for reader in (store, FeatureStore(store.folder, FORM, PLENTY)):
        assert torch.equal(reader.read(key(1)), features(1)), "the younger record counts"


def test_a_damaged_entry(store):
    fill(store, range(3))
    (index,) = segment_files(store.folder, "index")
    raw = bytearray(index.read_bytes())
    raw[24 + 3] ^= 1  # in the key of the second
    index.write_bytes(raw)
    reopened = FeatureStore(store.folder, FORM, PLENTY)
    assert reopened.count() == 2
    assert reopened.read(key(1)) is None


def test_a_file_cut_while_it_is_in_use(store):
    fill(store, range(3))
    (data,) = segment_files(store.folder, "features")
    os.truncate(data, FORM.record + 5)
    assert torch.equal(store.read(key(0)), features(0))
    assert store.read(key(1)) is None
    assert store.read(key(2)) is None


def test_the_budget_is_kept_by_all_together(tmp_path):
    entry = 24
    stores = [FeatureStore(tmp_path / "features" / name, FORM, 10 * (FORM.record + entry)) for name in ("a", "b")]
    fill(stores[0], range(6))
    fill(stores[1], range(6))
    assert stores[0].trouble is None
    assert "budget" in stores[1].trouble
    assert stores[1].read(key(0)) is None
    used = sum(file.stat().st_size for file in (tmp_path / "features").rglob("*") if file.is_file())
    assert used <= stores[0].budget


def test_a_quarter_of_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "used_and_free", lambda folder: (100, 300))
    assert FeatureStore.below(tmp_path, "eye", FORM).budget == 100


def test_a_full_disk_ends_writing_and_nothing_else(store, monkeypatch):
    fill(store, range(3))
    real, written = os.pwrite, []

    def full(handle, data, offset):
        written.append(real(handle, data[: len(data) // 2], offset))  # a part still fits
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    fill(store, range(3, 6))
    assert written
    assert "No space left" in store.trouble
    monkeypatch.undo()
    for reader in (store, FeatureStore(store.folder, FORM, PLENTY)):
        assert [reader.read(key(n)) is not None for n in range(6)] == [True] * 3 + [False] * 3
    fill(store, range(3, 6))
    assert store.read(key(3)) is None, "it is not tried again"


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "features").write_text("a file")
    store = FeatureStore(tmp_path / "features" / "eye", FORM, PLENTY)
    fill(store, [1])
    assert store.trouble
    assert store.read(key(1)) is None
    assert measure_reading(tmp_path / "features", FORM.record) is None


def test_reading_is_measured(tmp_path):
    assert 0 < measure_reading(tmp_path / "features", 10_000) < 1
    assert not list((tmp_path / "features").iterdir())


@pytest.mark.parametrize("ending", ["features", "index"])
def test_a_segment_that_cannot_be_opened_hides_no_other(ending, store):
    fill(store, range(3))
    (lost,) = segment_files(store.folder, ending)
    other = FeatureStore(store.folder, FORM, PLENTY)
    fill(other, range(3, 6))
    lost.unlink()
    open_files = len(os.listdir("/proc/self/fd"))
    late = FeatureStore(store.folder, FORM, PLENTY)
    assert [late.read(key(n)) is not None for n in range(6)] == [False] * 3 + [True] * 3
    assert late.read(key(9)) is None
    assert len(os.listdir("/proc/self/fd")) == open_files + 2, "what could not be used is closed again"


def test_a_folder_that_is_deleted_under_a_run_is_begun_anew(store):
    fill(store, range(3))
    shutil.rmtree(store.folder)
    fill(store, range(3, 6))
    late = FeatureStore(store.folder, FORM, PLENTY)
    assert [late.read(key(n)) is not None for n in range(6)] == [False] * 3 + [True] * 3
    assert store.read(key(1)) is None
    assert store.trouble is None
