"""Where results go is closed, full, or has heard enough: a line at the most, never a traceback."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minimind_v.cli.terminal import command_line
from minimind_v.core.train.launch import PROGRAM
from tests.cli.harness import MMV, tiny_data


@pytest.mark.parametrize(
    ("where", "code", "out", "err"),
    [
        (">&-", 0, "", ""),
        ("2>&- >&-", 0, "", ""),
        (">/dev/full", 1, "", "error: No space left on device\n"),
        ("| true", 1, "", ""),
    ],
)
def test_a_result_that_nobody_takes(where, code, out, err):
    if "/dev/full" in where and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = f"set -o pipefail; {shlex.join([str(MMV), 'info', str(tiny_data().data('sft'))])} {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_a_result_of_which_the_first_line_is_taken():
    """Whether the rest is written before nobody listens any more is a matter of chance, and nothing else is."""
    command = f"set -o pipefail; {shlex.join([str(MMV), 'info', str(tiny_data().data('sft'))])} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=os.environ)
    assert (done.stdout, done.stderr) == ("kind                dataset\n", "")
    assert done.returncode in (0, 1)


def test_a_line_to_paste_names_this_program_as_the_shell_can_find_it(tmp_path, monkeypatch):
    """As `make demo` starts it, `mmv` is not on the path."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    program = tmp_path / ".venv" / "bin" / "mmv"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.argv", [".venv/bin/mmv", "demo"])
    assert command_line("chat", "--image", Path("a b.jpg")) == ".venv/bin/mmv chat --image 'a b.jpg'"
    monkeypatch.setenv("PATH", str(program.parent))
    assert command_line("chat") == "mmv chat"
    monkeypatch.setattr("sys.argv", [str(tmp_path / "__main__.py"), "demo"])
    assert command_line("chat") == f"{sys.executable} -m minimind_v chat"
    monkeypatch.setattr("sys.executable", str(program.with_name("python")))
    assert command_line("chat") == "mmv chat", "the same installation"
    monkeypatch.setenv(PROGRAM, ".venv/bin/mmv")
    assert command_line("chat") == ".venv/bin/mmv chat", "as the launcher of this process was called"
