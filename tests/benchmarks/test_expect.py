"""The demo over several seeds: the intervals are Student's, and both pages get the table."""

import json

import pytest
from scipy import stats

from benchmarks import expect
from benchmarks.expect import over_seeds
from minimind_v.core.demo.run import Size

SEEN = [0.9983, 0.995, 0.9917, 1.0, 0.9967]


def test_the_interval_is_that_of_scipy():
    low, high = stats.t.interval(0.95, len(SEEN) - 1, loc=sum(SEEN) / len(SEEN), scale=stats.sem(SEEN))
    assert over_seeds(SEEN, is_share=True) == f"99.6 % [{100 * low:.1f}, {100 * min(high, 1):.1f}] ± 0.3"
    losses = [value + 1 for value in SEEN]
    assert over_seeds(losses, is_share=False) == f"1.996 [{low + 1:.3f}, {high + 1:.3f}] ± 0.003"
    assert over_seeds([0.5], is_share=True) == "50.0 %"


@pytest.fixture
def pages(tmp_path, monkeypatch):
    pages = {language: tmp_path / f"expect{language}.md" for language in ("", "_zh")}
    for page in pages.values():
        page.write_text("<!-- begin expect -->\n<!-- end expect -->\n")
    monkeypatch.setattr(expect, "PAGES", pages)
    return pages


def run_expect(monkeypatch, out, seeds):
    monkeypatch.setattr("sys.argv", ["expect", "--out", str(out), "--seeds", str(seeds), "--docs"])
    expect.main()


def test_complete_demos_are_read_and_not_run_again(tmp_path, pages, monkeypatch):
    for generation in ("2025", "3v"):
        for seed, share in enumerate((0.9, 1.0)):
            folder = tmp_path / f"{generation}-{seed}"
            for stage in ("pretrain", "sft"):
                run = folder / "out" / f"{stage}_vlm_128"
                run.mkdir(parents=True)
                losses = [4.0, *[2.0] * 8, 1.0]
                lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
                (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            (folder / "summary.json").write_text(json.dumps(dict.fromkeys(expect.SHARES, share)))
    monkeypatch.setattr(expect.Demo, "run", lambda self: pytest.fail("the demo ran again"))
    run_expect(monkeypatch, tmp_path, 2)
    english, chinese = (page.read_text() for page in pages.values())
    assert "| | 2025, seeds 0 to 1 | 3v, seeds 0 to 1 |" in english
    assert "| new scenes | 95.0 % [31.5, 100.0] ± 7.1 | 95.0 % [31.5, 100.0] ± 7.1 |" in english
    assert "| pretrain: first loss | 4.000 [4.000, 4.000] ± 0.000 |" in english
    assert "| sft: last loss | 1.000 " in english
    assert "| 新场景 | 95.0 %" in chinese


@pytest.mark.long
def test_the_short_form_runs_both_generations(tmp_path, pages, monkeypatch):
    monkeypatch.setattr(expect, "SIZE", Size(pretrain_rows=32, sft_rows=32, test_rows=8))
    run_expect(monkeypatch, tmp_path / "demos", 1)
    assert {path.name for path in (tmp_path / "demos").iterdir()} == {"2025-0", "3v-0"}
    assert pages[""].read_text().count("\n| ") == 9
