"""All pages: each block says what it holds, and what a program prints there is compared with the program."""

import re

import pytest

from tests.cli.harness import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_holds(page):
    fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(fences[::2])
    assert not any(fences[1::2])


def test_the_output_of_a_page_is_compared_by_the_test_of_that_page():
    for page in PAGES:
        if "```output" in page.read_text(encoding="utf-8"):
            test = ROOT / "tests" / "docs" / f"test_{page.stem}.py"
            assert "check_outputs(" in test.read_text(encoding="utf-8"), page.name
