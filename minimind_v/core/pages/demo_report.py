"""The demo's report: one HTML file with the loss curves and held-out images with answers."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from minimind_v.core.pages.frame import figures, page, write_page
from minimind_v.core.pages.plot import curves as draw
from minimind_v.core.pages.run_report import image_gains
from minimind_v.core.rows.cells import data_uri


@dataclass(frozen=True)
class Sample:
    """A held-out image with a question, the correct answer, and three answers of the model."""

    picture: bytes  # JPEG
    question: str
    truth: str
    before: str
    after: str
    blank: str


LEGEND = {
    "truth": "the correct answer",
    "after": "the answer after training: green if correct, red if wrong",
    "before": "the answer before training, with an untrained projector",
    "blank": "the answer after training, with a blank grey image",
}


def write_report(
    path: Path,
    summary: dict[str, Any],
    curves: dict[str, list[tuple[int, float]]],
    evaluations: list[dict[str, Any]],
    samples: list[Sample],
    about: str,
) -> None:
    """Write the page atomically, as one self-contained file.

    `evaluations` are those of pretraining; `about` describes what the model understands.
    """
    shares = {
        "correct on new scenes": summary["accuracy_heldout_scenes"],
        "correct on new shape-colour pairs": summary["accuracy_heldout_pairs"],
        "correct with a blank image": summary["accuracy_blank"],
        "correct before training": summary["accuracy_before"],
    }
    plots = "".join(
        f"<h2>Loss of {escape(stage)}</h2>{draw({'loss': list(points)})}" for stage, points in curves.items()
    )
    heading = "When does it begin to look? New pairs, during pretraining"
    looks = image_gains(heading, evaluations) if evaluations else ""  # a full disk costs them
    half = len(samples) // 2
    sheets = "".join(
        f"<h3>{title}</h3><div class='sheet'>{''.join(map(_card, cards))}</div>"
        for title, cards in (("New scenes", samples[:half]), ("New shape-colour pairs", samples[half:]))
    )
    kinds = "".join(
        f"<tr><td>{escape(kind)}</td><td>{value:.0%}</td><td>{_percent(summary['by_kind_pairs'].get(kind))}</td></tr>"
        for kind, value in summary["by_kind_scenes"].items()
    )
    key = "".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in LEGEND.items())
    body = (
        f"<h1>A model that learnt to see</h1><p>Seed {summary['seed']}, "
        f"{summary['seconds_training_and_evaluation']:.0f} seconds of training and evaluation on "
        f"{escape(summary['machine'])}. An answer is correct if it equals the expected answer exactly.</p>"
        f"<p>{escape(about)}</p>"
        f"{figures({name: f'{share:.1%}' for name, share in shares.items()})}{plots}"
        f"{looks}"
        f'<section><h2>By kind of question</h2><div class="wide"><table>'
        f"<tr><th>question</th><th>new scenes</th><th>new pairs</th></tr>{kinds}</table></div></section>"
        f"<h2>Held-out images, with questions and answers</h2>"
        f'<dl class="key">{key}</dl>{sheets}'
    )
    write_page(path, page("mmv demo", body, "plot", "demo_report"))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _card(sample: Sample) -> str:
    verdict = "right" if sample.after == sample.truth else "wrong"
    return (
        f'<div class="card"><img src="{data_uri(sample.picture, "jpeg")}" alt=""><p>{escape(sample.question)}</p><dl>'
        f"<dt>truth</dt><dd>{escape(sample.truth)}</dd>"
        f'<dt>after</dt><dd class="{verdict}">{escape(sample.after) or "–"}</dd>'
        f'<dt class="dim">before</dt><dd class="dim">{escape(sample.before) or "–"}</dd>'
        f'<dt class="dim">blank</dt><dd class="dim">{escape(sample.blank) or "–"}</dd></dl></div>'
    )
