"""A folder that holds what the stages leave, and the commands that a page gives."""

import re
import shutil

import pytest

from tests.cli import harness
from tests.cli.harness import ASSETS, EYE


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    shutil.copytree(EYE, tmp_path / "model/vision_model/clip-vit-base-patch16")
    shutil.copy(ASSETS / "tokenizer.json", tmp_path / "model")
    (tmp_path / "out").mkdir()
    for ending in (".pth", ".json"):
        shutil.copy(harness.sighted().with_suffix(ending), tmp_path / "out" / f"sft_vlm_128{ending}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(page):
    """The lines of a page's blocks of commands, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def check_outputs(page, printed):
    """Compare a page's blocks of output with what was printed, line by line; only digits may differ."""
    blocks = re.findall(r"```output\n(.*?)```", page, re.DOTALL)
    assert blocks
    lines = {_form(line) for line in printed.splitlines()}
    shown = [line for block in blocks for line in block.splitlines()]
    assert [line for line in shown if _form(line) not in lines] == []


def _form(line):
    """A line without its digits and the width of its columns."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d,.]*(e[-+]\d+)?", "0", line)).strip()
