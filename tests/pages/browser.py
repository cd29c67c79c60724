"""Headless Chromium for tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip


@contextmanager
def open_browser(**settings: Any) -> Iterator[Any]:
    """A page of a fresh browser. `page.errors` collects what its console complains of.

    Skips the test where there is no Chromium.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as program:
        browser = program.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_context(
            **{"viewport": {"width": 1200, "height": 900}, "locale": "en-US"} | settings
        ).new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: _is_error(message) and page.errors.append(message.text))
        try:
            yield page
        finally:
            browser.close()


def _is_error(message: Any) -> bool:
    """Whether a line of the console is an error; that a server has no icon is none."""
    return bool(message.type == "error" and not message.location["url"].endswith("/favicon.ico"))
