"""What a person does on the page, and the files that are used for it."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

from PIL import Image

from minimind_v.core.demo import world


def scene(seed: int = 1) -> bytes:
    """A picture file of the demo's world."""
    rng = random.Random(seed)
    file = io.BytesIO()
    world.draw(world.make_scene(rng), rng).save(file, "PNG")
    return file.getvalue()


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def attach(page: Any, *files: tuple[str, bytes]) -> None:
    """Choose picture files, and wait until they are shown."""
    before = page.locator(".thumbnails img").count()
    payload = [{"name": name, "mimeType": "application/octet-stream", "buffer": data} for name, data in files]
    page.set_input_files("#compose input[multiple]", payload)
    page.locator(".thumbnails img").nth(before + len(files) - 1).wait_for()


def ask(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def answers(page: Any) -> list[str]:
    """The answers on the page, when none is growing any more."""
    page.locator("#question").wait_for()
    page.locator(".send[type=submit]").first.wait_for()
    return page.locator(".answer > .text").all_text_contents()


def ask_and_wait(page: Any, text: str) -> str:
    ask(page, text)
    page.locator(".question .text", has_text=text).last.wait_for()
    return answers(page)[-1]


def open_conversation(page: Any, title: str) -> None:
    """Choose a conversation in the history, and wait until it is shown."""
    page.locator("#conversations .title", has_text=title).click()
    page.locator("#title", has_text=title).wait_for(state="attached")


def sent_images(request: dict[str, Any]) -> list[bytes]:
    """The picture files in a request, in order."""
    urls = [
        item["image_url"]["url"]
        for message in request["messages"]
        if isinstance(message["content"], list)
        for item in message["content"]
        if item["type"] == "image_url"
    ]
    return [base64.b64decode(url.split(",", 1)[1]) for url in urls]
