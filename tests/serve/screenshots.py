"""Images of the page for the docs: `python -m tests.serve.screenshots MODEL [FOLDER]`, with weights of `mmv demo`."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from minimind_v.core.demo import world
from minimind_v.core.demo.world import Item
from tests.cli.harness import ROOT
from tests.serve.browser import open_browser
from tests.serve.harness import Server
from tests.serve.page_actions import ask_and_wait, attach, encoded

SCENE = (
    Item("star", "yellow", "big", "top left"),
    Item("circle", "blue", "big", "centre"),
    Item("cross", "white", "small", "bottom right"),
)
SHOTS = {
    "page-light": {"locale": "en-US", "color_scheme": "light", "viewport": {"width": 1100, "height": 640}},
    "page-dark-zh-phone": {"locale": "zh-CN", "color_scheme": "dark", "viewport": {"width": 390, "height": 640}},
}
QUESTIONS = {
    "en-US": ("What colour is the circle?", "How many objects are there?"),
    "zh-CN": ("描述这张图片。", "有几个物体？"),
}


def shoot(model: Path, folder: Path) -> list[Path]:
    """Write the images of a server of their own; returns their paths."""
    with tempfile.TemporaryDirectory() as scratch, open_browser() as browser:
        server = Server(Path(scratch), model=model)
        try:
            return shots(browser, server.url, folder)
        finally:
            server.end()


def shots(browser: Any, url: str, folder: Path) -> list[Path]:
    """Talk to a model on the page, greedily, and write an image of each of `SHOTS`; returns their paths."""
    picture = encoded(world.draw(SCENE, random.Random(1)), "PNG")
    return [_shot(browser, url, picture, folder / f"{name}.png", options) for name, options in SHOTS.items()]


def _shot(browser: Any, url: str, picture: bytes, path: Path, options: dict[str, Any]) -> Path:
    context = browser.new_context(**options, device_scale_factor=1.5 if "phone" in path.name else 1)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("html[data-ready]")
    page.evaluate("() => localStorage.setItem('mmv.settings', '{\"temperature\": 0, \"max_tokens\": 64}')")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    attach(page, ("scene.png", picture))
    for question in QUESTIONS[options["locale"]]:
        ask_and_wait(page, question)
    page.mouse.move(0, 0)
    page.screenshot(path=path)
    context.close()
    return path


if __name__ == "__main__":
    model, *folder = map(Path, sys.argv[1:])
    for path in shoot(model, folder[0] if folder else ROOT / "docs" / "images"):
        print(path, path.stat().st_size)
