"""A command that is started in a fork has all of its own, and ends as one that is started afresh."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import fork_server
from tests.cli.harness import Running, installed, run_mmv, sighted, tiny_data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every command is started afresh")


def show_all_of_its_own():
    print(os.getcwd(), os.getsid(0) == os.getpid(), os.environ.get("A_NAME"), flush=True)
    print(sys.stdin.read(), sys.stdout.isatty(), file=sys.stderr)


def sleep_long():
    print("asleep", flush=True)
    time.sleep(600)


def fork(tmp_path, prepare, env=None, args=("--version",)):
    """The process, and the files of its output and its errors."""
    (tmp_path / "in").write_text("a question")
    paths = [tmp_path / name for name in ("in", "out", "err")]
    files = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    process = fork_server.start([*args], files, environment, tmp_path, prepare=prepare)
    for file in files:
        os.close(file)
    return process, *paths[1:]


@pytest.mark.long
def test_it_has_a_session_a_folder_an_environment_and_files_of_its_own(tmp_path):
    process, out, err = fork(tmp_path, show_all_of_its_own, {"A_NAME": "a value"})
    assert process.wait(60) == 0
    assert process.poll() == 0
    first, version = out.read_text().splitlines()
    assert first == f"{tmp_path} True a value"
    assert version.startswith("mmv ")
    assert err.read_text() == "a question False\n"
    assert "A_NAME" not in os.environ


@pytest.mark.long
def test_a_signal_ends_it_and_is_its_exit_code(tmp_path):
    process, out, _ = fork(tmp_path, sleep_long)
    while "asleep" not in out.read_text():
        time.sleep(0.01)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def test_a_wrong_command_ends_with_its_code_in_both_ways(monkeypatch):
    forked = installed("info", "nothing-of-this-name")
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    fresh = installed("info", "nothing-of-this-name")
    assert (forked.code, forked.out, forked.err) == (fresh.code, fresh.out, fresh.err)
    assert forked.code


def test_settings_that_are_read_at_the_start_make_a_fresh_start(tmp_path):
    process, out, _ = fork(tmp_path, None, {"PYTHONHASHSEED": "1"})
    assert isinstance(process, subprocess.Popen)
    assert process.wait(60) == 0
    assert out.read_text().startswith("mmv ")


def test_two_run_at_once(tmp_path):
    runs = [Running(tmp_path / name, "info", tiny_data().data("sft")) for name in ("a", "b")]
    assert len({run.pid for run in runs}) == 2
    ended = [run.wait() for run in runs]
    assert [end.code for end in ended] == [0, 0]
    assert ended[0].out == ended[1].out != ""


def test_a_command_that_ran_in_this_process_keeps_no_other_from_being_forked(tmp_path):
    """`mmv convert` sets a variable that is read when torch starts, and torch sets one itself when it trains."""
    assert run_mmv("convert", "--to", "pth", "--model", sighted(), "--out", tmp_path / "copy.pth").code == 0
    process, *_ = fork(tmp_path, None, {"TORCHINDUCTOR_CACHE_DIR": "anywhere"})
    assert isinstance(process, fork_server.Fork)
    assert process.wait(60) == 0
