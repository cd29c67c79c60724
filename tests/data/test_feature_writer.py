"""A thread that stores features: all of them, in a queue that ends, and each trouble once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import pytest
import torch

from minimind_v.core.data.feature_store import FeatureStore
from minimind_v.core.data.feature_writer import WAITING, FeatureWriter
from tests.data.test_feature_store import FORM, PLENTY, features, key


def group(first: int, count: int = 4) -> tuple[list[bytes], torch.Tensor]:
    numbers = range(first, first + count)
    return [key(n) for n in numbers], torch.stack([features(n) for n in numbers])


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    return FeatureStore(tmp_path / "features" / "eye", FORM, PLENTY)


@pytest.mark.parametrize("threaded", [False, True])
def test_after_a_flush_all_is_stored(threaded, store):
    writer = FeatureWriter(store, print, threaded)
    for first in range(0, 80, 4):
        writer.write(*group(first))
        assert store.read(key(10**6)) is None, "reading beside it disturbs nothing"
    writer.flush()
    reopened = FeatureStore(store.folder, FORM, PLENTY)
    assert reopened.count() == 80
    assert all(torch.equal(reopened.read(key(n)), features(n)) for n in range(80))


def test_a_slow_disk_is_waited_for_when_a_few_groups_wait(store, monkeypatch):
    writes, allowed = [], threading.Semaphore(0)

    def write(keys, _):
        allowed.acquire()
        writes.append(keys)

    monkeypatch.setattr(store, "write", write)
    writer = FeatureWriter(store, print, threaded=True)
    for first in range(WAITING):
        writer.write(*group(first))
    assert not writes, "no write was waited for"
    blocked = threading.Thread(target=writer.write, args=group(100))
    blocked.start()
    blocked.join(0.05)
    assert blocked.is_alive()
    allowed.release(WAITING + 1)
    blocked.join(20)
    writer.flush()
    assert [keys[0] for keys in writes] == [key(n) for n in (*range(WAITING), 100)]


def test_the_trouble_of_a_disk_is_reported_once_and_by_the_caller(store):
    store.folder.parent.write_text("a file")
    threads = []
    writer = FeatureWriter(store, lambda text: threads.append((threading.current_thread(), text)), threaded=True)
    for first in range(0, 40, 4):
        writer.write(*group(first))
    writer.flush()
    ((thread, text),) = threads
    assert thread is threading.main_thread()
    assert text.startswith("no more features are cached: ")


def test_a_mistake_in_the_thread_is_not_lost(store, monkeypatch):
    monkeypatch.setattr(store, "write", lambda *_: 1 / 0)
    writer = FeatureWriter(store, print, threaded=True)
    writer.write(*group(0))
    with pytest.raises(ZeroDivisionError):
        writer.flush()


def _write_and_be_killed(folder, writes: int) -> None:
    """Encodes on and on; is killed in the middle of a write, while others wait."""
    real, count = os.pwrite, [0]

    def pwrite(handle, data, offset):
        count[0] += 1
        if count[0] > writes:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(handle, data, offset)

    os.pwrite = pwrite
    writer = FeatureWriter(FeatureStore(folder, FORM, PLENTY), print, threaded=True)
    for first in range(0, 4000, 4):
        writer.write(*group(first))


@pytest.mark.parametrize("writes", [0, 3, 9, 21])
def test_a_kill_between_encoding_and_writing_loses_features_only(writes, store):
    child = multiprocessing.get_context("fork").Process(target=_write_and_be_killed, args=(store.folder, writes))
    child.start()
    child.join(20)
    assert child.exitcode == -signal.SIGKILL
    reopened = FeatureStore(store.folder, FORM, PLENTY)
    whole = writes // 5 * 4  # four records, then their entries: only a group with its entries counts
    assert reopened.count() == whole
    assert all(torch.equal(reopened.read(key(n)), features(n)) for n in range(whole))
    writer = FeatureWriter(reopened, print, threaded=True)
    writer.write(*group(0, 40))
    writer.flush()
    assert all(torch.equal(reopened.read(key(n)), features(n)) for n in range(40))


def test_a_fork_reads_while_a_thread_of_its_parent_writes(store):
    """The lock that the thread holds is another than the fork's."""
    FeatureWriter(store, print, threaded=False).write(*group(0))
    with store._lock:
        child = multiprocessing.get_context("fork").Process(target=_read, args=(store,))
        child.start()
        child.join(20)
    assert child.exitcode == 0


def _read(store: FeatureStore) -> None:
    assert torch.equal(store.read(key(1)), features(1))
