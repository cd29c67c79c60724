"""`mmv demo`: run the whole pipeline on a small generated world."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal, command_line
from minimind_v.core.demo.generations import DEMO_GENERATIONS


class Generation(str, Enum):
    """The generations of the demo."""

    v2025 = "2025"
    v3 = "3v"


def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of all results. [default: demo, or demo-3v]"),
    ] = None,
    generation: Annotated[
        Generation, typer.Option(help="Form of the model: that of 2025, or that of minimind-3v.")
    ] = Generation.v2025,
    seed: Annotated[int, typer.Option(min=0, help="Seed of images, questions and new weights.")] = 0,
    short: Annotated[bool, typer.Option("--short", help="Use a quarter of the rows: faster, less accurate.")] = False,
    json: options.Json = False,
) -> None:
    """Run the whole pipeline on a small generated world, in minutes on two CPU cores."""
    from minimind_v.cli.live import TrainView
    from minimind_v.core.demo.run import FULL, SHORT, Demo
    from minimind_v.core.files import size_of

    terminal = Terminal()

    def announce(title: str, commands: list[str]) -> None:
        view.begin_stage()
        terminal.say("\n   $ ".join([f"\n── {title}", *commands]))

    form = DEMO_GENERATIONS[generation.value]
    out = out or form.out
    with TrainView(terminal, "demo") as view:
        summary = Demo(out, seed, view, announce, SHORT if short else FULL, form).run()
    if json:
        terminal.json(summary)
        return
    example = summary["example"]
    chat = ["chat", "--model", example["model"], "--image", example["image"], example["question"]]
    terminal.table({
        "held-out scenes": f"{summary['accuracy_heldout_scenes']:.1%} of the answers are correct",
        "held-out shape-colour pairs": f"{summary['accuracy_heldout_pairs']:.1%}",
        "blank image": f"{summary['accuracy_blank']:.1%}",
        "before training": f"{summary['accuracy_before']:.1%}",
        "training and evaluation": f"{summary['seconds_training_and_evaluation']:.0f} s",
        "report": str(out / "report.html"),
        "images": f"{Path(example['image']).parent}: a dozen images for your questions",
        "ask the model": command_line(*chat),
        "or on a page": command_line("web", "--model", example["model"]),
        "free the disk": f"{shlex.join(['rm', '-r', str(out)])} ({size_of(out) / 1e6:,.0f} MB)",
    })  # fmt: skip
    terminal.say(f"\n{summary['knows']}")
