"""The frame of every HTML page: one self-contained file without scripts, in a light and a dark theme."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from minimind_v.core.curate.token_text import visible
from minimind_v.core.errors import UsageError
from minimind_v.core.files import write_text

# With this policy a browser neither runs nor fetches anything in a row of data.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark; --back: #fbfaf8; --card: #fff; --ink: #1f2328; --dim: #6b7280; --line: #e4e2dd;
  --supervised: #bbf0cc; --supervised-ink: #0b4a22; --accent: #2457d6; --warn: #b42318; --chip: #f0eee9;
  --chip2: #e6e3dc; --image: #dbe7ff; --image-ink: #173a8a; --special: #eadcfb; --special-ink: #532291;
  --cut: #f7dcd9 }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --card: #1c1f25; --ink: #e6e6e3; --dim: #9aa1ac;
  --line: #31353d; --supervised: #14532d; --supervised-ink: #c5f6d6; --accent: #8ab0ff; --warn: #ff9a8f;
  --chip: #2a2e36; --chip2: #343944; --image: #1e3566; --image-ink: #d3e1ff; --special: #43265f;
  --special-ink: #ecdcff; --cut: #4a2320 } }
* { box-sizing: border-box }
body { font: 16px/1.6 system-ui, "Noto Sans CJK SC", sans-serif; margin: 0 auto; max-width: 68rem;
  padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--back) }
h1 { font-size: clamp(1.6rem, 5vw, 2.4rem); line-height: 1.15; margin: .5rem 0; letter-spacing: -.02em }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.2rem 0 .6rem }
p { margin: .5rem 0; max-width: 44rem } .dim { color: var(--dim) } .warn { color: var(--warn) }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere }
section { background: var(--card); border: 1px solid var(--line); border-radius: .8rem; padding: 1.1rem 1.2rem;
  margin: 1.2rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
section h2 { margin: 0 0 .4rem; font-size: 1.1rem }
td, th { text-align: right; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line) }
td:first-child, th:first-child { text-align: left } th { font-weight: 600; color: var(--dim) }
td + td { white-space: nowrap } td code { overflow-wrap: normal }
.wide { overflow-x: auto } .figures { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0 }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: .8rem; padding: .7rem 1rem;
  flex: 1 1 9rem; color: var(--dim); font-size: .9rem; line-height: 1.35 }
.figure b { display: block; font-size: 1.6rem; color: var(--ink); font-weight: 650 }
"""

BEGIN = (
    f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
)


def check_page(path: Path) -> None:
    """Raises UsageError if `path` is a file that is not a page of mmv."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder, the page needs a file name — name a file")
    if path.is_file() and path.stat().st_size and path.read_bytes()[: len(BEGIN)] != BEGIN.encode():
        raise UsageError(f"{path} exists and is not a page by mmv — name another file")


def write_page(path: Path, text: str) -> None:
    """Write a page atomically. Raises UsageError as `check_page` does, RunError if it cannot be written."""
    check_page(path)
    write_text(path, text)


def page(title: str, body: str, style: str = "") -> str:
    """A whole page. `body` and `style` are already HTML and CSS."""
    return (
        f"{BEGIN}"
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(visible(title))}</title><style>{STYLE}{style}</style></head><body>{body}</body></html>\n"
    )


def figures(numbers: Mapping[str, str]) -> str:
    """One box per number, with its label. The numbers are already HTML."""
    boxes = (f'<div class="figure"><b>{number}</b>{escape(label)}</div>' for label, number in numbers.items())
    return f'<div class="figures">{"".join(boxes)}</div>'


def data_uri(data: bytes, kind: str) -> str:
    """An image file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
