"""The live view: what it shows, at any width, on a terminal and elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import signal
import time

import pytest
from rich.console import Console

from minimind_v.cli.live import POINTS, Curve, TrainView, clock, sparkline
from minimind_v.cli.terminal import Terminal
from minimind_v.core.monitor.metrics import StepMetrics, TaskScores, Validation
from tests.cli.harness import MMV, Running, tiny_data


def show_step(step, loss=2.0, steps=200):
    return StepMetrics(
        step, steps, step / steps, loss, 0.5, 4e-4, 1.5, 4 * step, 900 * step, 90 * step, step, 0.3 * step
    )


def view(width, terminal=True):
    shown = Terminal()
    shown.err = Console(
        file=io.StringIO(), width=width, height=30, force_terminal=terminal, force_interactive=terminal, soft_wrap=True
    )
    return TrainView(shown, "pretrain")


def scores(step, gain, low=None):
    gains = {"blank": {"value": gain, "ci_low": low, "ci_high": low and 0.3}}
    return TaskScores(step, "vqa", "d.jsonl", 9, 8, "vqa", 0.5, 0.4, 0.6, 0.25, gains, [], "p.jsonl", 1.0)


def lines(shown):
    return shown._draw().plain.split("\n")


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_everything_is_there_and_no_line_is_wider_than_the_terminal(width):
    shown = view(width)
    assert "starting" in lines(shown)[0]
    for step in range(1, 120):
        shown.step(show_step(step, 2 - step / 100), step % 20 == 0)
    shown.validated(Validation(100, 1.25, 0.6, 1.75, 10, True))
    shown.validated(Validation(110, 1.35, 0.6, 1.75, 10, False))
    shown.evaluated(scores(100, 0.0, -0.1))
    shown.evaluated(scores(110, 0.25, 0.2))
    shown.saved(100)
    text = "\n".join(lines(shown))
    for phrase in ("step 119/200", "loss 0.8100", "token accuracy 50%", "lr 4.00e-04", "grad 1.50", "4.0 samples/s",
                  "900 tokens/s", "data 30%", "memory ", "left 1:21", "validation 1.3500", "(best 1.2500 at 100)",
                  "1.7500", "saved at 100", "█", "▁", "images add ▁█"):  # fmt: skip
        assert phrase in text
    console = Console(file=io.StringIO(), width=width)
    console.print(shown._draw())
    assert max(map(len, console.file.getvalue().splitlines())) <= width


def test_a_terminal_that_was_made_narrower_is_wiped_whole():
    """Its lines have become more than were drawn."""
    shown = view(80)
    for step in range(1, 50):
        shown.step(show_step(step), False)
    drawn = lines(shown)
    shown._live.auto_refresh = False
    with shown:
        shown._live.refresh()
        file = shown.terminal.err.file
        begun = file.tell()
        shown._live.refresh()
        assert file.getvalue()[begun:].count("\x1b[1A") == len(drawn) - 1
        shown.terminal.err.width = 40
        begun = file.tell()
        shown._live.refresh()
        broken = sum(-(-len(line) // 40) for line in drawn)
        assert broken > len(drawn)
        assert file.getvalue()[begun:].count("\x1b[1A") == broken - 1


def test_the_end_of_a_run_stays_above_what_comes_after_it():
    shown = view(80)
    with shown:
        shown.begin_stage()
        shown.terminal.say("pretraining")
        shown.step(show_step(100), True)
        shown.validated(Validation(100, 1.25, 0.6, None, 10, True))
        shown.begin_stage()
        shown.terminal.say("fine-tuning")
        shown.step(show_step(1), True)
        assert "validation" not in "\n".join(lines(shown)), "another run begins afresh"
        shown.begin_stage()
        shown.terminal.say("convert")
    words = ("pretraining", "step 100/200", "fine-tuning", "step 1/200", "convert", "starting")
    assert [word for word in words if word in (kept := screen(shown))] == [*words[:-1]]
    assert sorted(words[:-1], key=kept.index) == [*words[:-1]]


def screen(shown):
    """What is left on the terminal, top down: its cursor moves up and wipes lines."""
    rows, row = [""], 0
    for piece in re.split(r"(\x1b\[[0-9;?]*[a-zA-Z]|[\r\n])", shown.terminal.err.file.getvalue()):
        if piece == "\x1b[1A":
            row -= 1
        elif piece == "\x1b[2K":
            rows[row] = ""
        elif piece == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        elif piece != "\r" and not piece.startswith("\x1b"):
            rows[row] += piece
    return "\n".join(rows)


def test_elsewhere_there_are_plain_lines():
    shown = view(80, terminal=False)
    with shown:
        shown.step(show_step(1), True)
        shown.step(show_step(2), False)
        shown.validated(Validation(2, 1.25, 0.6, 1.5, 10, True))
    lines = shown.terminal.err.file.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 1/200  loss 2.0000  token accuracy 50%")
    assert lines[1] == (
        "step 2  validation loss 1.2500, 1.5000 with images of other rows  token accuracy 60%  (the best so far)"
    )


def test_a_curve_of_any_length_keeps_its_shape_in_few_points():
    curve = Curve()
    for step in range(10_000):
        curve.add(10_000 - step)
    assert len(curve.points) < 2 * POINTS
    assert curve.points == sorted(curve.points, reverse=True)
    assert sparkline(curve.points, 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, 1.0], 8) == "▁▁"
    assert sparkline([float("nan"), 1.0], 8) == "▁▁"
    assert sparkline([], 8) == ""


def test_clock():
    assert [clock(59), clock(61), clock(7384)] == ["0:59", "1:01", "2:03:04"]


def test_ctrl_c_on_a_terminal_leaves_it_in_order(tmp_path):
    main, side = pty.openpty()
    shown = b""
    run = Running(tmp_path, *tiny_data().train(tmp_path / "out", epochs=1000), terminal=os.ttyname(side))
    os.set_blocking(main, False)
    end = time.monotonic() + 100
    asked = False
    while time.monotonic() < end and (run.alive or not asked):
        try:
            shown += os.read(main, 65536)
        except BlockingIOError:
            time.sleep(0.02)
        if not asked and re.search(rb"step [2-9]", shown):
            os.write(main, b"\x03")
            asked = True
    assert run.process.wait(20) == 128 + signal.SIGINT
    time.sleep(0.1)
    with contextlib.suppress(BlockingIOError):
        shown += os.read(main, 65536)
    os.close(main)
    os.close(side)
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0, "the cursor is back"
    assert f"resume with: {MMV} train".encode() in shown


def test_an_evaluation_is_a_line_elsewhere():
    shown = view(200, terminal=False)
    shown.evaluated(scores(110, 0.25, 0.2))
    shown.evaluated(scores(120, None))
    assert shown.terminal.err.file.getvalue().splitlines() == [
        "step 110  vqa 0.5 [0.4, 0.6], blank 0.25, gain 0.25 [0.2, 0.3]",
        "step 120  vqa 0.5 [0.4, 0.6], blank 0.25",
    ]
