"""A disk that is full, folders that cannot be written: the old file stays, nothing half-written appears."""

import errno
import json
import os
import resource
import stat
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from minimind_v.core import files
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.errors import RunError
from minimind_v.core.files import write_atomically, write_text
from minimind_v.core.formats.checkpoint import read_checkpoint, write_checkpoint
from minimind_v.core.monitor.metrics import JsonLines, StepMetrics
from minimind_v.core.train import run as running
from minimind_v.core.train import saver
from minimind_v.core.train.loop import Run
from minimind_v.core.train.resume import States
from tests.cli.harness import BASE, read_rows, run_mmv, sighted, tiny_data, tree

LIMIT = 200_000  # bytes that a file may have: enough for words, too few for weights


@contextmanager
def room(limit):
    """No file of this process may grow beyond a limit, as on a disk that is full."""
    tiny_data(), sighted()  # are made before
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def no_room():
    with room(LIMIT):
        yield


@pytest.fixture
def old(tmp_path):
    """A file that stands there already."""
    path = tmp_path / "weights.bin"
    path.write_text("old")
    return path


def untouched(path):
    return path.read_text() == "old" and tree(path.parent) == [path.name]


# --- writing one file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError, SystemExit])
def test_an_exception_in_the_middle_leaves_the_old_file(old, error):
    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_atomically(old, write)
    assert untouched(old)


def test_a_full_disk_leaves_the_old_file_and_says_so(old, no_room):
    with pytest.raises(RunError, match=r"weights\.bin: not saved \(File too large\); the older file is unchanged"):
        write_atomically(old, lambda file: file.write(bytes(2 * LIMIT)))
    assert untouched(old)


def test_a_disk_that_fills_when_the_file_is_synced_leaves_the_old_file(old, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        write_text(old, "new")
    assert untouched(old)


def test_the_new_file_is_whole_before_it_takes_its_name(old):
    def write(file):
        file.write(b"new")
        assert old.read_text() == "old"

    write_atomically(old, write)
    assert old.read_text() == "new"
    assert tree(old.parent) == [old.name]


def test_a_device_is_written_into_and_stays_one(tmp_path):
    device = tmp_path / "device"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 7))  # /dev/full, but one that may be lost
        with pytest.raises(RunError, match=r"device: not written \(No space left on device\)"):
            write_text(device, "text")
    except PermissionError:
        pytest.skip("no device can be made here")
    assert device.is_char_device()
    assert tree(tmp_path) == []


def test_a_pipe_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    heard = []
    reader = threading.Thread(target=lambda: heard.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "text")
    reader.join()
    assert heard == ["text"]


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    texts = {"a" * 200_000, "b" * 300_000}
    write_text(path, min(texts))
    done, contents = threading.Event(), set()

    def read():
        while not done.is_set():
            contents.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(40):
        for text in texts:
            write_text(path, text)
    done.set()
    reader.join()
    assert contents <= texts


def test_a_file_has_the_rights_that_any_new_file_would_have(tmp_path):
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_at_the_path_of_the_file_is_left_alone(tmp_path):
    (tmp_path / "weights.pth" / "inner").mkdir(parents=True)
    with pytest.raises(RunError, match="not saved"):
        write_text(tmp_path / "weights.pth", "new")
    assert (tmp_path / "weights.pth" / "inner").is_dir()
    assert tree(tmp_path) == []


@pytest.fixture
def closed():
    """A folder that must not be written in; root, to whom no folder is closed, becomes somebody else."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        if user == 0:
            os.seteuid(65534)
        yield Path(folder)
        os.seteuid(user)


def test_a_folder_that_cannot_be_written_is_reported(closed):
    with pytest.raises(RunError, match=r"weights\.bin: cannot be written \(Permission denied\)"):
        write_text(closed / "weights.bin", "text")
    with pytest.raises(RunError, match=r"weights\.bin: cannot be written \(Permission denied\)"):
        write_text(closed / "new" / "weights.bin", "text")
    assert tree(closed) == []


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_weights_on_a_full_disk_leave_the_old_ones_and_their_description(tmp_path, no_room, ending):
    path = tmp_path / f"w{ending}"
    small = {"model.norm.weight": torch.ones(4)}
    write_checkpoint(path, small, PRESETS["demo"], "pretrain")
    before = {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)}
    with pytest.raises(RunError, match="File too large"):
        write_checkpoint(path, read_checkpoint(BASE).tensors, PRESETS["small"], "sft")
    assert {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)} == before


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_weights_on_a_full_disk_leave_nothing_where_nothing_was(tmp_path, no_room, ending):
    with pytest.raises(RunError):
        write_checkpoint(tmp_path / f"w{ending}", read_checkpoint(BASE).tensors, PRESETS["demo"], "sft")
    assert tree(tmp_path) == []


def test_a_description_that_cannot_be_written_leaves_the_old_weights(tmp_path):
    write_checkpoint(tmp_path / "w.pth", {"a": torch.ones(4)}, PRESETS["demo"], "sft")
    before = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.json").unlink()
    (tmp_path / "w.json").mkdir()
    with pytest.raises(RunError, match=r"w\.json: not saved"):
        write_checkpoint(tmp_path / "w.pth", {"a": torch.zeros(4)}, PRESETS["demo"], "sft")
    assert (tmp_path / "w.pth").read_bytes() == before
    assert tree(tmp_path) == ["w.pth"]


# --- whole commands ---------------------------------------------------------------------------------------------------


def test_a_run_continues_after_a_failed_save_and_tries_again(tmp_path, no_room):
    ended = run_mmv(*tiny_data().train(tmp_path / "out", save_every=4, features="off"))
    assert ended.code == 1
    starts = [line.split(":")[0] for line in ended.err.splitlines() if "File too large" in line]
    assert (starts[0], starts[-1]) == ("step 4", "error")
    # The next one is tried when the one before has failed, which a thread finds out.
    assert len(starts) > 3
    assert starts[:-1] == sorted(set(starts[:-1]) & {f"step {step}" for step in range(4, 10)})
    assert "step 10/10" in ended.err
    assert ended.error.endswith(
        "pretrain_vlm_128.pth: not saved (File too large) — nothing is saved: free some disk space, and start again "
        "with --overwrite"
    )
    kept = ("config.yaml", "events.jsonl", "manifest.json", "metrics.jsonl")
    assert tree(tmp_path / "out") == [f"pretrain_vlm_128/{name}" for name in kept]


def test_a_run_with_room_for_its_weights_alone_is_finished(tmp_path):
    with room(4_000_000):  # the state of sft has three numbers of fp32 for each weight
        ended = run_mmv(*tiny_data().train(tmp_path / "out", "sft", max_steps=2, init=sighted()))
    assert ended.code == 0, ended.err
    assert "safetensors: not saved (File too large); the run is finished and its weights are saved" in ended.err
    assert read_checkpoint(tmp_path / "out" / "sft_vlm_128.pth").stage == "sft"
    assert (tmp_path / "out" / "sft_vlm_128" / "report.html").is_file()


def test_weights_that_had_no_room_are_written_by_a_resume(tmp_path, monkeypatch):
    line = tiny_data().train(tmp_path / "out", max_steps=2)

    def fill(path, *_):
        raise RunError(f"{path}: not saved (No space left on device)")

    monkeypatch.setattr(saver, "write_checkpoint", fill)
    ended = run_mmv(*line)
    monkeypatch.undo()
    assert ended.code == 1
    assert "device) — free some disk space, and resume from step 2 with --resume" in ended.error
    assert run_mmv(*line, "--resume").code == 0
    assert run_mmv(*tiny_data().train(tmp_path / "whole", max_steps=2)).code == 0
    resumed, whole = ((tmp_path / name / "pretrain_vlm_128.pth").read_bytes() for name in ("out", "whole"))
    assert resumed == whole


def test_a_run_that_ends_early_with_weights_alone_says_how_to_go_on_from_them(tmp_path, monkeypatch):
    line, launch = tiny_data().train(tmp_path / "out", "sft", init=sighted()), Run._launch

    def fail_late(run, step, batches):
        if step == 3:
            raise RunError("the loss is not finite")
        return launch(run, step, batches)

    monkeypatch.setattr(Run, "_launch", fail_late)
    with room(4_000_000):
        ended = run_mmv(*line)
    weights = tmp_path / "out" / "sft_vlm_128.pth"
    assert f"{weights} has the weights of step 2, but no state to resume from is saved" in ended.error
    monkeypatch.undo()
    again = tiny_data().train(tmp_path / "again", "sft", max_steps=1, init=weights)
    assert f"with --init {weights} and another --out" in ended.error
    assert run_mmv(*again).code == 0


def test_what_killed_writers_have_left_is_removed_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    line = tiny_data().train(out, max_steps=2)
    assert run_mmv(*line).code == 0
    before = tree(out)
    half = ("pretrain_vlm_128.pth", "pretrain_vlm_128.json", "pretrain_vlm_128/states/step-0000000002-ab.safetensors")
    for name in half:
        (out / name).with_name(f".{Path(name).name}.x1y2z3_a.tmp").write_bytes(b"half")
    others = (out / ".pretrain_vlm_128_moe.pth.x1y2z3_a.tmp", out / ".mine")
    for path in others:
        path.write_bytes(b"another's")
    assert run_mmv(*line, "--resume").code == 0
    assert tree(out) == sorted([*before, *(path.name for path in others)])


def test_a_run_continues_where_its_metrics_cannot_be_written(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    folder = tmp_path / "out" / "pretrain_vlm_128"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    ended = run_mmv(*tiny_data().train(tmp_path / "out", max_steps=2))
    assert ended.code == 0, ended.err
    assert "metrics.jsonl: not written (No space left on device)" in ended.err
    assert read_checkpoint(tmp_path / "out" / "pretrain_vlm_128.pth").stage == "pretrain"


def test_metrics_that_found_no_room_are_written_when_there_is_some(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.write(asdict(metrics(1)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        with pytest.raises(RunError, match="not written"):
            log.write(asdict(metrics(2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write(asdict(metrics(3)))
    log.close()
    assert [record["step"] for record in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def metrics(step):
    return StepMetrics(step, 3, step / 3, 1.0, 0.5, 1e-3, 1.0, 4, 400, 40, 1.0, 0.1)


def test_a_conversion_on_a_full_disk_leaves_nothing(tmp_path, no_room):
    for to in ("pth", "safetensors"):
        out = tmp_path / "new" / f"w.{to}"
        ended = run_mmv("convert", "--to", to, "--model", BASE, "--out", out)
        assert ended.code == 1
        assert f"{out}: not saved (File too large)" in ended.error
        assert tree(tmp_path / "new") == []


def test_a_disk_that_fills_in_the_middle_of_a_state_leaves_the_state_before(tmp_path, monkeypatch):
    line = *tiny_data().train(tmp_path / "out", max_steps=5, save_every=2), "--set", "keep=1"
    write = States.write

    def fill(states, step, *content):
        with room(LIMIT if step > 2 else 1 << 30):
            write(states, step, *content)

    monkeypatch.setattr(States, "write", fill)
    ended = run_mmv(*line)
    assert "step-0000000004" in ended.err
    assert ended.err.count("not saved (File too large)") == 2
    [state] = (tmp_path / "out" / "pretrain_vlm_128" / "states").iterdir()
    assert state.name.startswith("step-0000000002-")
    monkeypatch.undo()
    resumed = run_mmv(*line, "--resume")
    assert "resuming after step 2 of 5" in resumed.err
    assert run_mmv(*tiny_data().train(tmp_path / "whole", max_steps=5)).code == 0
    ours, whole = ((tmp_path / name / "pretrain_vlm_128.pth").read_bytes() for name in ("out", "whole"))
    assert ours == whole


@pytest.mark.parametrize(
    ("out", "message"),
    [("x" * 300, ": cannot be written (File name too long) — name another --out"),
     ("", "pretrain_vlm_128 must be the folder of this run, but is a file — name another --out")],
)  # fmt: skip
def test_a_place_that_takes_no_run_is_refused_before_weights_are_read(tmp_path, monkeypatch, out, message):
    (tmp_path / "pretrain_vlm_128").write_text("")
    monkeypatch.setattr(running, "load_initial", lambda *_: pytest.fail("weights were read"))
    ended = run_mmv(*tiny_data().train(tmp_path / out))
    assert message in ended.error
    assert tree(tmp_path) == ["pretrain_vlm_128"]


def test_a_disk_full_to_the_last_byte(small_disk):
    """The real thing, where the system lets a small disk be mounted."""
    disk = small_disk(2)
    write_checkpoint(disk / "w.pth", {"a": torch.ones(300_000)}, PRESETS["demo"], "sft")
    before = (disk / "w.pth").read_bytes()
    for ending in (".pth", ".safetensors"):
        with pytest.raises(RunError, match="No space left on device"):
            write_checkpoint(disk / f"w{ending}", {"a": torch.zeros(300_000)}, PRESETS["demo"], "sft")
    assert (disk / "w.pth").read_bytes() == before
    assert json.loads((disk / "w.json").read_text())["stage"] == "sft"
    assert tree(disk) == ["w.json", "w.pth"]
