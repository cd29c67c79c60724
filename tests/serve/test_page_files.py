"""The files of the page, as a wheel has them."""

import re

from tests.serve.stub import PAGE


def test_the_page_is_small():
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 150_000


def test_no_file_names_another_server_or_needs_an_inline_script():
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        addresses = [url for url in re.findall(r"https?://[^\s\"']+", text) if "www.w3.org" not in url]
        assert addresses == [], path.name
        assert re.findall(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", text) == [], path.name
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<style|style=|\son\w+=|<script(?![^>]*src=)", html) == []
