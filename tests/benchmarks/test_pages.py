"""A benchmark writes its figures into a page, and nothing beside them."""

import pytest

from benchmarks.pages import write_block

PAGE = "# Title\n\n<!-- begin curves -->\nold\n<!-- end curves -->\n\nprose … and\u2028its end"


def test_what_stands_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_bytes(PAGE.encode())
    for text in ("| a |\n|---|\n", "new"):
        write_block(page, "curves", text)
    assert page.read_bytes().decode() == PAGE.replace("old", "\nnew\n")


@pytest.mark.parametrize("text", ["# Title\n", PAGE.replace("begin", "end"), PAGE + "\n" + PAGE])
def test_a_page_without_its_markers_stays(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_bytes(text.encode())
    with pytest.raises(SystemExit, match="begin curves"):
        write_block(page, "curves", "new")
    assert page.read_bytes() == text.encode()
