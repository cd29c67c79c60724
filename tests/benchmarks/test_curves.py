"""The curves of the costs: lines that fit, updates that are the run's own, and a picture that is one."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import curves
from benchmarks.curves import QUICK, Learner, make_batch
from benchmarks.panels import line_through
from minimind_v.core.model.loss import IGNORE


def test_the_line_is_that_of_least_squares():
    assert line_through([(1, 5), (2, 7), (10, 23)]) == pytest.approx((2, 3, 0), abs=1e-9)
    slope, start, off = line_through([(0, 1), (1, 4), (2, 4)])  # by hand: 1.5 x + 1.5, off by 0.5 of 1
    assert (slope, start, off) == pytest.approx((1.5, 1.5, 0.5))


def test_padded_rows_are_worked_through_and_teach_nothing_more():
    torch.manual_seed(0)
    real, padded = (make_batch([240, 300], 600, supervised=20, padded=padded) for padded in (False, True))
    for batch, positions in ((real, 540), (padded, 600)):
        assert batch.supervised == 40
        assert int(batch.attention_mask.sum()) == positions
        assert (batch.labels[0, 220:240] == batch.input_ids[0, 220:240]).all()
        assert (batch.labels[0, 240:] == IGNORE).all()


def test_an_update_is_done():
    learner = Learner("demo")
    before = [parameter.detach().clone() for parameter in learner.train_step.trainable]
    assert learner.seconds(make_batch([240, 220], 600)) > 0
    moved = [not torch.equal(a, b) for a, b in zip(before, learner.train_step.trainable, strict=True)]
    assert all(moved)


def test_the_quick_form_prints_draws_and_writes(tmp_path, monkeypatch, capsys):
    tiny = replace(QUICK, preset="demo", rows=(1, 2), supervised=(16, 64), supervised_rows=1, longest=(240, 480))
    monkeypatch.setattr(curves, "QUICK", replace(tiny, padded=(480,), longest_rows=2, files=(10, 2_500)))
    monkeypatch.setattr(curves, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("<!-- begin curves -->\n<!-- end curves -->\n")
    threads = torch.get_num_threads()
    options = [
        "--quick",
        "--threads",
        str(threads),
        "--plot",
        str(tmp_path),
        "--docs",
        "--json",
        str(tmp_path / "found"),
    ]
    monkeypatch.setattr("sys.argv", ["curves", *options])
    curves.main()
    output = capsys.readouterr().out
    page = (tmp_path / "page.md").read_text()
    assert "| rows of 280 tokens | 1: " in page
    assert page.count("\n| ") == 7  # the head, and a line for each
    assert page.split("\n\n")[1] in output
    drawn = ElementTree.parse(tmp_path / "growth.svg").getroot()
    assert len(drawn.findall(".//{*}circle")) == 2 * 6
