"""The pages on looking inside: every command runs as it stands there, in a folder as the demo leaves it."""

import json
import shlex

import pytest

from minimind_v.core.pages.frame import check_page
from tests.cli.harness import ROOT, run_mmv
from tests.demo_folder import demo_folder
from tests.docs.conftest import commands

ENGLISH, CHINESE = (
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("look.md", "look_zh.md")
)  # fmt: skip


@pytest.mark.long
def test_every_command_runs_as_it_stands(tmp_path, monkeypatch):
    folder = demo_folder(tmp_path / "demo")
    monkeypatch.chdir(folder)
    lines = commands(ENGLISH)
    assert len(lines) >= 6
    for line in lines:
        ended = run_mmv(*shlex.split(line)[1:], "--max-new-tokens", 8)
        assert ended.code == 0, f"{line}\n{ended.err}"
        if "--json" in line:
            assert json.loads(ended.out)["tokens"]
    check_page(folder / "look.html")
    assert (folder / "look.html").stat().st_size > 50_000


def test_both_languages_give_the_same_commands():
    assert commands(ENGLISH) == commands(CHINESE)
