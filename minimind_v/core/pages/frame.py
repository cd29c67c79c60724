"""The frame of every HTML page: one self-contained file, in a light and a dark theme; few have a script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from pathlib import Path

from minimind_v.core.curate.token_text import visible
from minimind_v.core.errors import UsageError
from minimind_v.core.files import write_text

# With this policy a browser neither runs nor fetches anything in a row of data.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

ENDINGS = (".html", ".htm")
ASSETS = Path(__file__).with_name("assets")
BEGIN = (
    f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}'
)


def check_page(path: Path) -> None:
    """Raises UsageError if `path` is a file that is not a page of mmv, or has not the ending of one."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder, the page needs a file name — name a file")
    if path.is_file() and path.stat().st_size and path.read_bytes()[: len(BEGIN)] != BEGIN.encode():
        raise UsageError(f"{path} exists and is not a page by mmv — name another file")
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"{path} has no ending of a page — name it {path.with_suffix('.html')}")


def write_page(path: Path, text: str) -> None:
    """Write a page atomically. Raises UsageError as `check_page` does, RunError if it cannot be written."""
    check_page(path)
    write_text(path, text)


def page(title: str, body: str, *sheets: str, script: str = "") -> str:
    """A whole page. `body` is already HTML; `sheets` name its style sheets in `assets`, besides that of the frame.

    A browser runs `script`, an ES module, by its digest, and no other script.
    """
    policy, module = "", ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, module = f"; script-src 'sha256-{digest}'", f'<script type="module">{script}</script>'
    style = "".join((ASSETS / f"{name}.css").read_text(encoding="utf-8") for name in ("frame", *sheets))
    return (
        f'{BEGIN}{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(visible(title))}</title><style>\n{style}</style></head><body>{body}{module}</body></html>\n"
    )


def figures(numbers: Mapping[str, str]) -> str:
    """One box per number, with its label. The numbers are already HTML."""
    boxes = (f'<div class="figure"><b>{number}</b>{escape(label)}</div>' for label, number in numbers.items())
    return f'<div class="figures">{"".join(boxes)}</div>'
