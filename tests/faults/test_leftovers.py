"""What a killed process leaves goes with the next run; two that write the same are not both let through."""

import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from minimind_v.core import files
from minimind_v.core.curate import split as splitting
from minimind_v.core.curate.convert import convert
from minimind_v.core.curate.split import split
from minimind_v.core.errors import RunError, UsageError
from minimind_v.core.export import folder as folders
from minimind_v.core.export.folder import export
from minimind_v.core.files import only_writer, sweep, write_atomically, write_text
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.rows.stores import open_rows
from tests.cli.harness import ROOT, run_mmv, sighted, tree
from tests.export.made import order
from tests.rows.made import picture, row


@pytest.fixture
def rows(tmp_path):
    """Forty rows, each with a picture of its own."""
    folder = tmp_path / "source"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.png").write_bytes(picture(n))
    lines = [row("<image>q", f"a{n}", f"{n}.png") for n in range(40)]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    return open_rows(folder / "rows.jsonl", folder)


# --- leftovers --------------------------------------------------------------------------------------------------------

STUCK_IN = """
import sys, time
from pathlib import Path
from minimind_v.core import files
real = files.os.replace
def replace(source, target):
    if str(target) == sys.argv[-1]:
        print("now", flush=True)
        time.sleep(600)
    return real(source, target)
files.os.replace = replace
"""
CONVERT = """
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.curate.convert import convert
convert(open_rows(Path(sys.argv[1]), Path(sys.argv[1]).parent), Path(sys.argv[2]))
"""
FOLDER = """
from minimind_v.core.export import folder
from tests.export.made import order
folder._rename = lambda *_: (print("now", flush=True), time.sleep(600))
folder.export(order(), "hf", Path(sys.argv[1]), check=False)
"""


def killed_in(code, *options):
    """A process that is killed at the moment at which it is about to give a file its name."""
    command = [sys.executable, "-c", STUCK_IN + code, *map(str, options)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"now\n"
        process.kill()


@pytest.mark.long
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_what_a_killed_conversion_of_rows_left_goes_with_the_next(rows, tmp_path, ending):
    out = tmp_path / "new" / f"rows.{ending}"
    killed_in(CONVERT, rows.path, out)
    left = [name for name in tree(out.parent) if name.endswith(".tmp")]
    assert left, "as large as the output"
    done = convert(rows, out)
    assert (done.rows, done.resumed_at) == (40, 40), "the parts are gone on with"
    assert tree(out.parent) == sorted(path.name for path in done.files)


@pytest.mark.long
def test_what_a_killed_conversion_to_a_folder_left_goes_with_the_next_at_once(tmp_path):
    out = tmp_path / "model"
    killed_in(FOLDER, out)
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    export(order(), "hf", out, check=False)
    assert os.listdir(tmp_path) == ["model"]


def test_a_leftover_whose_lock_lasts_a_moment_longer_goes_too(tmp_path, monkeypatch):
    """A process that was killed gives its memory back before its locks."""
    left = tmp_path / ".model.abcd1234.tmp"
    left.mkdir()
    handle = os.open(left, os.O_RDONLY)
    files._lock(handle)
    sweep(tmp_path / "model")
    assert left.exists()
    asked = []
    monkeypatch.setattr(time, "sleep", lambda _: (asked.append(1), len(asked) == 3 and os.close(handle)))
    with only_writer(tmp_path / "model"):
        assert not left.exists()
    assert len(asked) == 3


def test_any_write_takes_away_what_was_left_of_the_same_name(tmp_path):
    for name in (".a.txt.abcd1234.tmp", ".b.txt.abcd1234.tmp", ".a.txt.tmp", ".a.txt.abcd1234.old"):
        (tmp_path / name).write_text("left")
    write_text(tmp_path / "a.txt", "new")
    assert sorted(os.listdir(tmp_path)) == [".a.txt.tmp", ".b.txt.abcd1234.tmp", "a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


def test_what_was_moved_aside_for_what_never_came_is_put_back(tmp_path):
    (tmp_path / ".model.abcd1234.old").mkdir()
    (tmp_path / ".model.abcd1234.old" / "weights").write_text("before")
    (tmp_path / ".model.abcd1234.tmp").mkdir()
    sweep(tmp_path / "model")
    assert tree(tmp_path) == ["model/weights"]


def test_a_file_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, swept = files._lock, []

    def late(handle):
        if not swept:
            swept.extend(tmp_path.glob(".a.*.tmp"))
            swept[0].unlink()
        lock(handle)

    monkeypatch.setattr(files, "_lock", late)
    write_atomically(tmp_path / "a", lambda file: file.write(b"whole"))
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert len(swept) == 1
    assert os.listdir(tmp_path) == ["a"]


def write_often(path, text):
    for _ in range(300):
        write_text(path, text * 1000)


@pytest.mark.long
def test_two_that_write_a_file_over_and_over_never_sweep_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path / "a", text)) for text in "xyz"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert len(set((tmp_path / "a").read_text())) == 1


# --- two at once ------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    """A second one waits no three seconds for the lock."""
    monkeypatch.setattr(files.Lock.__init__, "__defaults__", (0.1,))


@pytest.mark.usefixtures("impatient")
def test_of_two_conversions_of_one_target_one_is_refused(rows, tmp_path):
    commands = {
        "model.pth": ("convert", "--to", "pth", "--model", sighted(), "--out"),
        "model.safetensors": ("convert", "--to", "safetensors", "--model", sighted(), "--out"),
        "rows.parquet": ("data", "convert", rows.path, "--images", rows.path.parent),
    }
    for name, command in commands.items():
        out = tmp_path / name
        with only_writer(out):
            ended = run_mmv(*command, out)
        assert ended.code == 1, ended.err
        assert f"{out}: another process is writing it (process {os.getpid()} on " in ended.error
        assert not out.exists()
        assert run_mmv(*command, out).code == 0
        again = run_mmv(*command, out)
        assert again.code == 2
        assert " exists — add --overwrite" in again.error.replace("already ", "")
        assert not list(tmp_path.glob(f".{name}*"))


def test_of_two_conversions_to_one_folder_one_is_refused(tmp_path, monkeypatch):
    out, listings = tmp_path / "model", []
    real = folders._describe

    def meanwhile(*args):
        with pytest.raises(RunError, match="another process is writing it"):
            export(order(), "hf", out, check=False)
        listings.append(os.listdir(tmp_path))
        return real(*args)

    monkeypatch.setattr(folders, "_describe", meanwhile)
    export(order(), "hf", out, check=False)
    assert len(listings) == 1
    assert len(listings[0]) == 1, "the first is not harmed"
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_came_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    out, real = tmp_path / "model", folders._sync

    def meanwhile(staging):
        real(staging)
        out.mkdir()
        (out / "weights").write_text("by the other")

    monkeypatch.setattr(folders, "_sync", meanwhile)
    with pytest.raises(UsageError, match="already exists"):
        export(order(), "hf", out, check=False)
    assert tree(tmp_path) == ["model/weights"]


def test_a_target_that_comes_while_a_conversion_waits_is_not_replaced(tmp_path, monkeypatch):
    """Neither of two that start together may take the other's result for nothing there."""
    out = tmp_path / "model.safetensors"
    real = files.Lock._take

    def take(lock, end):
        out.write_bytes(b"by the other, meanwhile")
        return real(lock, end)

    monkeypatch.setattr(files.Lock, "_take", take)
    with pytest.raises(UsageError, match="already exists"):
        export(ExportRequest(sighted()), "safetensors", out)
    assert out.read_bytes() == b"by the other, meanwhile"


@pytest.mark.usefixtures("impatient")
def test_of_two_demos_in_one_folder_one_is_refused(tmp_path):
    out = tmp_path / "demo"
    with only_writer(out / ".mmv-demo"):
        ended = run_mmv("demo", "--out", out, "--short")
    assert ended.code == 1
    assert "another process is writing it" in ended.error
    assert not out.exists()


# --- both sides of a split, or neither --------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("failing", ["writing", "naming"])
def test_a_split_that_fails_keeps_both_old_sides(rows, tmp_path, monkeypatch, packed, failing):
    source = open_rows(convert(rows, tmp_path / "rows.parquet").files[0]) if packed else rows
    out = tmp_path / "sides"
    first = split(source, out, 10, 1)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(before) == 2
    if failing == "writing":
        write = "convert" if packed else "_write_rows"
        real = getattr(splitting, write)

        def fail(rows, path, *args, **how):
            if path.stem == "train":
                raise RunError(f"{path}: not saved (No space left on device)")
            return real(rows, path, *args, **how)

        monkeypatch.setattr(splitting, write, fail)
    else:
        replace = type(first.train).replace

        def refuse(path, target):
            if target == first.train and path.name == first.train.name:
                raise OSError(28, "No space left on device")
            return replace(path, target)

        monkeypatch.setattr(type(first.train), "replace", refuse)
    with pytest.raises(RunError, match="No space left"):
        split(source, out, 10, 2, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    monkeypatch.undo()
    second = split(source, out, 10, 2, overwrite=True)
    assert second.held_out_rows == 10
    assert {path.name for path in out.iterdir()} == set(before)
    assert {path.name: path.read_bytes() for path in out.iterdir()} != before
