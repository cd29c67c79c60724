"""The page of `mmv look`: an answer and its trace, in one file that shows what is pointed at."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from minimind_v.core.curate.token_text import visible
from minimind_v.core.pages.frame import ASSETS, page, write_page

# Shows the trace in the language of the browser, and again in another one that a button chooses.
START = """
const trace = JSON.parse(document.getElementById("trace").textContent);
const titles = { en: "Inside an answer", zh: "看看回答的内部" }, other = { en: "中文", zh: "English" };
let end = () => {};
function start(language) {
  end();
  end = mount(document.getElementById("look"), trace, { language });
  document.documentElement.lang = language;
  document.querySelector("h1").textContent = titles[language];
  const button = document.getElementById("language");
  button.textContent = other[language];
  button.onclick = () => start(language === "en" ? "zh" : "en");
}
start(navigator.language.startsWith("zh") ? "zh" : "en");
"""


def write_microscope(path: Path, trace: dict[str, Any]) -> None:
    """Write the page of a trace, in its JSON form. Raises UsageError for a file that is not a page of mmv."""
    write_page(path, microscope_page(trace))


def microscope_page(trace: dict[str, Any]) -> str:
    """The whole page."""
    data = json.dumps(trace, ensure_ascii=True).replace("<", "\\u003c")
    body = (
        f'<header class="top"><h1>Inside an answer</h1><button id="language" type="button">中文</button></header>'
        f'<p class="dim"><code>{escape(visible(trace["model"]))}</code></p><main id="look"></main>'
        f'<noscript><p class="warn">This page shows its numbers with JavaScript, which is off.</p></noscript>'
        f'<script type="application/json" id="trace">{data}</script>'
    )
    viewer = (ASSETS / "look.js").read_text(encoding="utf-8").replace("export function mount(", "function mount(")
    return page(f"{trace['question']} — mmv look", body, "microscope", "look", script=viewer + START)
