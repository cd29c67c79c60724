"""The demo's report: one HTML file with the curves and a sheet of held-out pictures."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from minimind_v.core.files import write_text
from minimind_v.core.inspect.plot import STYLE as PLOT_STYLE
from minimind_v.core.inspect.plot import curves as draw


@dataclass(frozen=True)
class Sample:
    """A held-out picture with a question, the truth, and three answers."""

    picture: bytes  # JPEG
    question: str
    truth: str
    before: str
    after: str
    blank: str


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
h1, h2 { line-height: 1.2 }
td, th { text-align: left; padding: 0 1.5rem .25rem 0 }
dl { margin: 0; display: grid; grid-template-columns: auto 1fr; gap: 0 .5rem }
dd { margin: 0 }
:root { --line: #e5e7eb } svg text { fill: #777; font: 12px system-ui, sans-serif }
.figures { display: flex; flex-wrap: wrap; gap: 1rem }
.figure { background: #f3f4f6; border-radius: .5rem; padding: .75rem 1rem; flex: 1 1 10rem }
.figure b { display: block; font-size: 1.8rem }
.sheet { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)) }
.card { border: 1px solid #ddd; border-radius: .5rem; padding: .75rem; font-size: .9rem }
.card img { width: 100%; image-rendering: pixelated; border-radius: .25rem }
.right { color: #15803d; font-weight: 600 }
.wrong { color: #b91c1c; font-weight: 600 }
.dim { color: #777 }
"""


def write_report(
    path: Path, summary: dict[str, Any], curves: dict[str, list[tuple[int, float]]], samples: list[Sample]
) -> None:
    """Write the page atomically; it needs nothing besides itself."""
    figures = {
        "scenes never seen": summary["accuracy_heldout_scenes"],
        "shape-colour pairs never seen": summary["accuracy_heldout_pairs"],
        "the same questions, blank picture": summary["accuracy_blank"],
        "before training": summary["accuracy_before"],
    }
    boxes = "".join(f'<div class="figure"><b>{value:.1%}</b>{escape(name)}</div>' for name, value in figures.items())
    plots = "".join(
        f"<h2>Loss while {escape(stage)} runs</h2>{draw({'loss': list(points)}, from_zero=True)}"
        for stage, points in curves.items()
    )
    half = len(samples) // 2
    sheets = "".join(
        f"<h2>{title}</h2><div class='sheet'>{''.join(map(_card, part))}</div>"
        for title, part in (("Scenes never seen", samples[:half]), ("Pairs never seen", samples[half:]))
    )
    kinds = "".join(
        f"<tr><td>{escape(kind)}</td><td>{value:.0%}</td><td>{_percent(summary['by_kind_pairs'].get(kind))}</td></tr>"
        for kind, value in summary["by_kind_scenes"].items()
    )
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>mmv demo</title>
<style>{_STYLE}{PLOT_STYLE}</style>
<h1>A model that learnt to see</h1>
<p>Seed {summary["seed"]}, {summary["seconds_training_and_evaluation"]:.0f} seconds of training and evaluation on
{escape(summary["machine"])}. An answer counts as right when it equals the truth to the letter.</p>
<div class="figures">{boxes}</div>{plots}
<h2>By kind of question</h2><table><tr><th>asks for</th><th>scenes</th><th>pairs</th></tr>{kinds}</table>{sheets}</html>
"""
    write_text(path, page)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _card(sample: Sample) -> str:
    source = "data:image/jpeg;base64," + base64.b64encode(sample.picture).decode()
    verdict = "right" if sample.after == sample.truth else "wrong"
    return (
        f'<div class="card"><img src="{source}" alt=""><p>{escape(sample.question)}</p><dl>'
        f"<dt>truth</dt><dd>{escape(sample.truth)}</dd>"
        f'<dt>after</dt><dd class="{verdict}">{escape(sample.after) or "–"}</dd>'
        f'<dt class="dim">before</dt><dd class="dim">{escape(sample.before) or "–"}</dd>'
        f'<dt class="dim">blank</dt><dd class="dim">{escape(sample.blank) or "–"}</dd></dl></div>'
    )
