"""Screenshots of docs/look.md and docs/evaluate.md: `python -m tests.pages.screenshots demo-3v`, a demo's folder."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

import minimind_v as mmv
from minimind_v.core.generate.engine import Engine
from minimind_v.core.generate.trace import TraceSettings, trace_answer
from minimind_v.core.pages.frame import ASSETS
from minimind_v.core.pages.microscope import microscope_page
from tests.cli.harness import ROOT, run_mmv
from tests.pages.browser import open_browser

IMAGES = ROOT / "docs" / "images"
MODEL = "out/sft_vlm_128.pth"  # in the folder of a demo
QUESTION, PICTURE = "Describe the picture.", "three_objects.jpg"
ADDRESS = "http://mmv.example/"
QUALITY = 78  # of a screenshot
BLANK = "<!doctype html><style>:root { color-scheme: light dark } body { margin: 1.5rem }</style><main></main>"
MOUNT = """async ([style, language]) => {
  document.head.append(Object.assign(document.createElement("style"), { textContent: style }));
  const { mount } = await import("/look.js");
  mount(document.querySelector("main"), await traced({}), { ask: traced, language });
}"""


def save(page: Any, name: str, height: float | None = None) -> None:
    """Save what the browser shows, or so many pixels of it from the top."""
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    image = image.crop((0, 0, image.width, int(height or image.height)))
    image.save(IMAGES / name, quality=QUALITY, method=6)
    print(IMAGES / name, (IMAGES / name).stat().st_size)


def point_at(page: Any, token: str, row: float, column: float) -> None:
    """Keep a token and a patch."""
    page.locator(".chip").get_by_text(token, exact=True).first.click()
    pad = page.locator(".pad").first
    side = pad.bounding_box()["width"] / 8
    pad.click(position={"x": side * (column - 0.5), "y": side * (row - 0.5)})
    page.wait_for_timeout(500)


def drag(page: Any, *corners: tuple[float, float]) -> None:
    """Paint patches along a path of rows and columns."""
    box = page.locator(".pad").first.bounding_box()
    for number, (row, column) in enumerate(corners):
        x, y = box["x"] + box["width"] * (column - 0.5) / 8, box["y"] + box["height"] * (row - 0.5) / 8
        page.mouse.move(x, y, steps=5)
        if not number:
            page.mouse.down()
    page.mouse.up()


def evaluation(demo: Path) -> None:
    """The page of an evaluation, as far as the figure of the confusion."""
    data = demo / "dataset" / "heldout_pairs_data.jsonl"
    with tempfile.TemporaryDirectory() as out:
        run_mmv("eval", "--model", demo / MODEL, "--data", data, "--task", "vqa", "--out", out)
        with open_browser(viewport={"width": 1000, "height": 700}) as page:
            page.goto(Path(out, "report.html").as_uri())
            box = page.locator("section", has=page.locator(".confusion")).bounding_box()
            save(page, "eval-report.webp", box["y"] + box["height"] + 16)


def microscope(demo: Path) -> None:
    """The page of an answer, alone and in the page of `mmv serve`."""
    model = mmv.load(demo / MODEL)
    trace = model.look(QUESTION, demo / "pictures" / PICTURE, occlusion=True)
    html = microscope_page(trace.as_json() | {"model": MODEL})
    engine = Engine(model.model, model.tokenizer, most_rows=1)
    messages = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    prompt = engine.prompt(messages, [demo / "pictures" / PICTURE])

    def traced(more: dict[str, Any]) -> dict[str, Any]:
        patches = [(image, patch) for image, patch in more.get("occlude", [])]
        return trace_answer(engine, prompt, TraceSettings(occlude=patches), QUESTION).as_json()

    def respond(route: Any) -> None:
        is_script = route.request.url.endswith("look.js")
        script = (ASSETS / "look.js").read_text(encoding="utf-8")
        route.fulfill(body=script if is_script else BLANK, content_type="text/javascript" if is_script else "text/html")

    file = IMAGES / "look.html"
    file.write_text(html, encoding="utf-8")
    try:
        with open_browser(viewport={"width": 1180, "height": 700}) as page:
            page.goto(file.as_uri())
            point_at(page, "star", 5, 4)
            save(page, "look.webp")
        phone = {"width": 400, "height": 800}
        with open_browser(viewport=phone, locale="zh-CN", color_scheme="dark") as page:
            page.goto(file.as_uri())
            page.locator("select").first.select_option("occlusion")
            point_at(page, "white", 7, 2)
            save(page, "look-phone-zh.webp")
    finally:
        file.unlink()
    with open_browser(viewport={"width": 1180, "height": 700}) as page:
        page.expose_function("traced", traced)
        page.route(f"{ADDRESS}**", respond)
        page.goto(ADDRESS)
        page.evaluate(MOUNT, [(ASSETS / "look.css").read_text(encoding="utf-8"), "en"])
        drag(page, (4, 4), (4, 5), (5, 5), (5, 4))
        page.locator("tr.painted td.value").get_by_text("+").wait_for()
        save(page, "look-painted.webp")


if __name__ == "__main__":
    microscope(Path(sys.argv[1]))
    evaluation(Path(sys.argv[1]))
