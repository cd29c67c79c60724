"""Reports fit a phone, however long the paths in them are."""

from __future__ import annotations

import json

import pytest

from minimind_v.core.pages.demo_report import Sample
from minimind_v.core.pages.demo_report import write_report as write_demo_report
from minimind_v.core.pages.run_report import write_report
from tests.cli.harness import tiny_data, write_rows
from tests.pages.browser import open_browser

PATH = f"/home/somebody/{'a_long_name_of_a_folder/' * 4}rows.jsonl"
GAIN = {"value": 0.5, "ci_low": 0.4, "ci_high": 0.6}
EVALUATION = {"task": "vqa", "metric": "vqa", "data": PATH, "blank": 0.1, "visual_gain": {"blank": GAIN}} | GAIN


def run_page(folder):
    steps = [{"step": step, "steps": 9, "loss": 1.0, "samples": step, "seconds": step} for step in range(1, 10)]
    write_rows(folder / "metrics.jsonl", steps)
    recalled = {"own": {"data": PATH, "rows": 6, "loss": 0.1, "token_accuracy": 1.0}}
    write_rows(folder / "events.jsonl", [{"step": 9, "evaluation": EVALUATION}, {"step": 9, "recalled": recalled}])
    notes = {"stage": "sft", "config": {"recall_rows": 6, "init": PATH}, "fingerprints": {"data.file": PATH}}
    (folder / "manifest.json").write_text(json.dumps(notes))
    return write_report(folder)


def demo_page(folder):
    shares = ("heldout_scenes", "heldout_pairs", "blank", "before")
    summary = {f"accuracy_{share}": 0.5 for share in shares} | {
        "seed": 0, "seconds_training_and_evaluation": 60, "machine": PATH,
        "by_kind_scenes": {"colour": 1.0}, "by_kind_pairs": {"colour": 0.5},
    }  # fmt: skip
    sample = Sample(tiny_data().picture().read_bytes(), "What is it?", "a star", "W" * 100, "a star", "a disc")
    evaluations = [EVALUATION | {"step": step} for step in (1, 2)]
    page = folder / "report.html"
    write_demo_report(page, summary, {"sft": [(1, 2.0), (2, 1.0)]}, evaluations, [sample] * 4, "It knows stars.")
    return page


@pytest.mark.long
@pytest.mark.parametrize("write", [run_page, demo_page])
def test_a_report_fits_a_phone_and_wide_tables_scroll_in_a_card(tmp_path, write):
    with open_browser(viewport={"width": 390, "height": 800}) as page:
        page.goto(write(tmp_path).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator(".wide").count() > 0
        assert page.locator(".wide").count() == page.locator("section .wide").count(), "its edges have a card's colour"
        assert page.errors == []
