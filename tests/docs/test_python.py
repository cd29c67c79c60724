"""The page on Python: every block runs, in order, as in one notebook, in a folder as the demo leaves it."""

import re

import pytest

from tests.cli.harness import ROOT
from tests.demo_folder import demo_folder

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_every_block_of_the_page_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(demo_folder(tmp_path / "demo"))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 15
    names = {}
    for block in blocks:
        exec(compile(block, f"docs/python.md: {block.splitlines()[0]}", "exec"), names)
    printed = capsys.readouterr().out
    assert "logits          [1, " in printed
    assert "10 steps, weights in ten_steps/sft_vlm_128.pth" in printed
    assert re.search(r"12 rows: loss \d", printed)
    assert re.search(r"exact \d\.\d+, 95 % interval", printed)
    assert "no image file at pictures/moon.jpg" in printed
