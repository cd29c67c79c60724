"""Containers and locales: no home, no name of the user, ASCII only; and messages that can be read."""

import json
import os
import subprocess

import pytest

from minimind_v.core.errors import MESSAGE, MmvError, RowError, readable, shorten
from tests.cli.harness import MMV, PATIENCE, SIGHT, read_rows, run_mmv, write_rows

LONG = "data:image/png;base64," + "iVBORw0KGgo" * 110_000  # 1.2 MB


@pytest.fixture
def nobody(monkeypatch):
    """A user without a home and without a name, as in many containers."""
    for name in ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["uid not found"])


@pytest.mark.long
def test_commands_work_without_a_home(nobody, tiny_data, sighted, tmp_path, monkeypatch):
    data = ("--images", tiny_data.images("sft"))
    export = ("convert", "--model", sighted, *SIGHT, "--to", "hf", "--out", tmp_path / "hf")
    for command in (
        ("doctor",),
        ("chat", "?", "--model", sighted, *SIGHT, "--image", tiny_data.picture()),
        ("data", "check", tiny_data.data("sft"), *data, *SIGHT),
        ("info", sighted),
        (*tiny_data.train(tmp_path / "out"), "--max-steps", 1),
        export,
        (*export, "--overwrite", "--no-verify"),
    ):
        ended = run_mmv(*command)
        assert ended.code == 0, ended.err


def run(*args, stdin="", **environment):
    """The installed command in an environment of ASCII."""
    command = [str(MMV), *map(str, args)]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, input=stdin.encode(), capture_output=True, env=os.environ | ascii_only | environment,
                          timeout=PATIENCE, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    return done.stdout.decode("ascii")


@pytest.mark.long
def test_a_question_is_utf_8_wherever_it_comes_from(sighted):
    args = ("chat", "--model", sighted, *SIGHT, "--greedy", "--max-new-tokens", 8)
    question = "有几个物体？"
    piped = run(*args, stdin=question)
    assert piped.strip()
    assert run(*args, question) == piped


@pytest.mark.long
def test_json_stays_json_where_the_output_is_ascii(sighted):
    """An escape of Python is none of JSON."""
    question = "😀 × 1?"
    answer = run("chat", "--model", sighted, *SIGHT, "--greedy", "--max-new-tokens", 4, "--json", question)
    assert json.loads(answer)["prompt"] == question


# --- messages ---------------------------------------------------------------------------------------------------------


def test_what_is_no_word_is_cut_in_every_message():
    for error in (MmvError(f"{LONG}: broken"), RowError(f"a.jsonl:7: {LONG}: broken")):
        assert len(str(error)) < 500
        assert str(error).endswith(": broken")
        assert f"({len(LONG):,} characters)" in str(error)
        assert readable(str(error)) == str(error)
    assert len(readable("word " * 100_000)) <= MESSAGE
    assert readable("a\nb\r\n  c") == "a b c"
    path = "/".join(["folder"] * 30)
    assert readable(f"{path}: not there") == f"{path}: not there"


@pytest.mark.parametrize("longest", [20, 80, 300])
def test_a_name_is_cut_in_its_middle(longest):
    cut = shorten("begin" + "x" * 5000 + "end", longest)
    assert len(cut) <= max(longest, 40)
    assert cut.startswith("begi")
    assert cut.endswith(" (5,008 characters)")
    assert shorten("x" * longest, longest) == "x" * longest


def test_a_picture_given_as_a_name_is_not_printed(tiny_data, sighted, tmp_path, guessed_time):
    rows = read_rows(tiny_data.data("sft"))[:4]
    for row, name in zip(rows, (LONG, "x" * 400_000, "a b " * 100_000, "ok.jpg"), strict=True):
        row["image"] = name
    data = write_rows(tmp_path / "rows.jsonl", rows)
    some = ("--images", tiny_data.images("sft"))
    for command in (
        ("data", "check", data, *some, *SIGHT),
        ("data", "stats", data, *some, *SIGHT),
        ("eval", "--model", sighted, *SIGHT, "--data", data, *some),
        ("info", data),
        tiny_data.train(tmp_path / "out", "sft", data=data),
        ("data", "convert", data, tmp_path / "rows.parquet", *some),
        ("chat", "--model", sighted, *SIGHT, "?", "--image", LONG),
        ("chat", "--model", LONG, *SIGHT, "?"),
        ("chat", "--device", LONG, "--model", sighted, *SIGHT, "?"),
        ("report", LONG),
    ):
        ended = run_mmv(*command)
        assert len(ended.out) + len(ended.err) < 12_000, command[:2]
        assert "Traceback" not in ended.err
