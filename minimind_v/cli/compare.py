"""`mmv compare`: is one evaluation really better than another."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.command import Command
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import UsageError, open_all, readable

BETWEEN = "--"  # between the two sides
SHOWN = 10  # questions whose score changed


class CompareCommand(Command):
    """The command keeps the word `--`, which otherwise only ends the options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with_value = {name for param in self.params if not getattr(param, "is_flag", True) for name in param.opts}
        if args and args[-1] in with_value:  # the value is missing, and the parser says so
            return super().parse_args(ctx, args[-1:])
        options_given: list[str] = []
        arguments: list[str] = []
        for before, word in pairwise(["", *args]):
            is_option = before in with_value or (word.startswith("-") and word != BETWEEN)
            (options_given if is_option else arguments).append(word)
        return super().parse_args(ctx, [*options_given, BETWEEN, *arguments])


def compare(
    evaluations: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B | A1 A2 … -- B1 B2 …",
            help="Folders or predictions.jsonl of `mmv eval --task`: two, or several seeds on each side of --.",
        ),
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page with images.")] = None,
    json: options.Json = False,
) -> None:
    """Compare two evaluations, or several seeds of two: the difference B - A, interval, p, changed scores."""
    from minimind_v.core.evaluate.compare import compare as compared
    from minimind_v.core.evaluate.compare import read_predictions
    from minimind_v.core.evaluate.sheets import read_thumbnails
    from minimind_v.core.pages.compare_report import compare_page
    from minimind_v.core.pages.frame import check_page, write_page

    if html:
        check_page(html)
    first, second = _sides(evaluations)
    opened = open_all(*(partial(read_predictions, path) for path in (*first, *second)))
    sides = opened[: len(first)], opened[len(first) :]
    report = compared(*sides)
    terminal = Terminal()
    if both := set.intersection(*({run.path.resolve() for run in side} for side in sides)):
        terminal.warn(f"the same evaluation is on both sides: {', '.join(map(str, sorted(both)))}")
    if html:
        thumbnails = [own for run in opened for own in read_thumbnails(run.path.parent).items()]
        write_page(html, compare_page(report, dict(thumbnails)))
        report["page"] = str(html)
    if json:
        terminal.json(report)
    else:
        _show(terminal, report)
        if html:
            terminal.say(f"page: {html}")


def _sides(evaluations: list[Path]) -> tuple[list[Path], list[Path]]:
    between = [number for number, path in enumerate(evaluations) if str(path) == BETWEEN]
    if len(between) > 1 or (len(evaluations) > 2 and not between):
        raise UsageError("give -- once, between the two sides: mmv compare A1 A2 -- B1 B2")
    end = between[0] if between else 1
    first, second = evaluations[:end], evaluations[end + len(between) :]
    if not first or not second:
        raise UsageError("two sides are compared — name an evaluation for each: mmv compare A B")
    return first, second


def _show(terminal: Terminal, report: dict[str, Any]) -> None:
    from minimind_v.core.evaluate.compare import direction
    from minimind_v.core.wording import answer_text, chance, plural

    unpaired = f" ({report['unpaired']} without a pair are left out)" if report["unpaired"] else ""
    terminal.result(f"{plural(report['rows'], 'question')}{unpaired}; B - A:")
    width = max(len(metric["name"]) for metric in report["metrics"])
    for metric in report["metrics"]:
        if metric["difference"] is None:
            continue
        interval = "" if metric["ci_low"] is None else f"  [{metric['ci_low']:+.4f}, {metric['ci_high']:+.4f}]"
        by_chance = "" if metric["p"] is None else f"  {chance(metric['p'])}"
        shown = f"  {direction(metric, True)}".rstrip() if report["lower_is_better"] else ""
        rows = metric["rows_to_see_half"]
        power = "" if rows is None else f"  half of this difference needs {plural(rows, 'question')}"
        terminal.result(f"{metric['name']:<{width}}  {metric['difference']:+.4f}{interval}{by_chance}{shown}{power}")
    for seeds in report.get("seeds", []):
        deviations = ["one seed" if value is None else f"±{value:.4f}" for value in seeds["deviations"]]
        terminal.result(f"{seeds['name']:<{width}}  between seeds: A {deviations[0]}, B {deviations[1]}")
    terminal.result(f"{plural(len(report['changed']), 'question')} changed the score")
    for entry in report["changed"][:SHOWN]:
        if entry["first"] or entry["second"]:
            sides = f"{answer_text(entry['first'])} / {answer_text(entry['second'])}"
        else:  # a loss has no answers
            sides = f"{entry['score_first']:.4f} / {entry['score_second']:.4f}"
        line = f"{entry['id']}: {entry['question']} → {entry['truth']}: {sides}"
        terminal.result(f"  {readable(line)}")
    if (more := len(report["changed"]) - SHOWN) > 0:
        terminal.result(f"  {more:,} more with --json")
