"""The README's installation and the Makefile behind it, with a pip that only writes down what it is asked for."""

import os
import re
import shlex
import shutil
import subprocess
import time

import pytest

from tests.cli.harness import ROOT
from tests.docs.conftest import commands

PAGES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")]

# `python -m venv FOLDER`, as far as the Makefile needs one: programs that write down how they are called.
PYTHON = """#!/bin/sh
mkdir -p "$3/bin"
for program in pip mmv python ruff mypy; do
  printf '#!/bin/sh\\necho %s "$@" >> "{calls}"\\n' "$program" > "$3/bin/$program"
  chmod +x "$3/bin/$program"
done
"""


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def make(clone):
    """`make(target)` runs a target; returns what each program was called with."""
    calls, python = clone / "calls", clone / "python"
    python.write_text(PYTHON.format(calls=calls))
    python.chmod(0o755)

    def run(target):
        calls.write_text("")
        done = subprocess.run(
            ["make", target, f"PYTHON={python}"], cwd=clone, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return calls.read_text().splitlines()

    return run


def installs(calls):
    return [call for call in calls if call.startswith("pip ")]


def test_the_demo_installs_what_running_takes_and_shows_how_far_it_is(make):
    calls = make("demo")
    assert installs(calls) == ["pip install --constraint constraints.txt --editable .[serve]"]
    assert calls[-1] == "mmv demo"
    assert make("demo") == ["mmv demo"]


@pytest.mark.parametrize("order", [("demo", "test"), ("test", "demo")])
def test_demo_and_test_follow_each_other_in_either_order(make, order):
    calls = [call for target in order for call in make(target)]
    assert len(installs(calls)) == 2
    assert "mmv demo" in calls
    assert [call for call in calls if "pytest" in call]
    assert [call for call in installs(calls) if "[dev]" in call]
    assert all("--constraint constraints.txt" in call and "--quiet" not in call for call in installs(calls))
    assert [*make("demo"), *installs(make("test"))] == ["mmv demo"]


def test_what_has_changed_is_installed_again(make, clone):
    make("test")
    for name, age in ((".venv/.ready", 90), (".venv/.ready-dev", 80), ("constraints.txt", 99), ("pyproject.toml", 50)):
        os.utime(clone / name, (time.time() - age,) * 2)
    assert len(installs(make("demo"))) == 1
    assert len(installs(make("lint"))) == 1


@pytest.mark.parametrize("page", PAGES, ids=["English", "Chinese"])
def test_the_page_begins_with_getting_the_project(page, tmp_path):
    first, second, third, *_ = commands(page)
    program, verb, address, folder = shlex.split(first)
    assert (program, verb) == ("git", "clone")
    assert second == f"cd {folder}"
    assert third == "make demo"
    if not (ROOT / ".git").exists():
        pytest.skip("not in a repository, so there is none to clone")
    line = first.replace(address, shlex.quote(str(ROOT)))
    subprocess.run(shlex.split(line), cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / folder / "Makefile").is_file()


@pytest.mark.parametrize("page", PAGES, ids=["English", "Chinese"])
def test_without_make_the_same_is_installed(page):
    lines = commands(page)
    recipe = re.search(r"\$\(READY\):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    same = [
        line.strip().replace("$(PYTHON)", "python3").replace("$(VENV)", ".venv").replace("$(BIN)", ".venv/bin")
        for line in recipe.splitlines()
    ]
    begin = lines.index(same[0])
    assert lines[begin : begin + 3] == [*same[:2], ".venv/bin/mmv demo"]


@pytest.mark.parametrize("page", PAGES, ids=["English", "Chinese"])
def test_the_pages_name_the_build_for_a_cpu(page):
    assert "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo" in commands(page)
