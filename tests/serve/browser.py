"""A browser on the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.pages.browser import ARGUMENTS, CHROMIUM
from tests.serve.stub import Running, Stub

# On a busy machine the history comes late. Here it always does: a test that does not wait for it never passes.
LATE_HISTORY = """Object.defineProperty(IDBTransaction.prototype, "oncomplete", {
    set(call) { this.addEventListener("complete", () => setTimeout(call, 100)); } });"""
FAKE_CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@contextmanager
def open_browser() -> Iterator[Any]:
    """Chromium, which Playwright drives."""
    from playwright.sync_api import sync_playwright  # it is missing where only the package is installed

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *FAKE_CAMERA])
        yield opened
        opened.close()


@pytest.fixture(scope="module")  # not longer: Playwright's event loop would be in the way of tests with their own
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with open_browser() as opened:
        yield opened


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(url, **context)` is the page when it is ready; it must have no error and ask no other server."""
    contexts, problems = [], []

    def open_one(url: str, init: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1180, "height": 780}, "locale": "en-US"} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        local = (url, "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(local) or problems.append(request.url))
        page.on("console", lambda message: "Security Policy" in message.text and problems.append(message.text))
        page.add_init_script(LATE_HISTORY + init)
        page.goto(url)
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def stub_server(stub: Stub) -> Iterator[Running]:
    running = Running(stub)
    yield running
    running.stop()


@pytest.fixture
def page(open_page: Callable[..., Any], stub_server: Running) -> Any:
    return open_page(stub_server.url)
