"""What the demo reaches over several seeds: means with 95 % intervals, and the spread between seeds.

    python -m benchmarks.expect                 five seeds of both generations, an hour on two busy cores
    python -m benchmarks.expect --docs          writes the tables into docs/expect.md and docs/expect_zh.md

Each demo leaves its folder in --out. One that has a summary is not run again, so an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from benchmarks.pages import PAGE, write_block
from minimind_v.core.demo.generations import DEMO_GENERATIONS
from minimind_v.core.demo.run import FULL, Demo
from minimind_v.core.evaluate.statistics import LEVEL
from minimind_v.core.monitor.metrics import Listener, read_metrics

SIZE = FULL
PAGES = {language: PAGE.with_name(f"expect{language}.md") for language in ("", "_zh")}
HEADS = {  # the line above a table, and the head of a column
    "": (
        "On {cores} CPU cores. Mean over seeds [its 95 % interval] ± standard deviation between seeds.",
        "{generation}, seeds 0 to {last}",
    ),
    "_zh": (
        "{cores} 个 CPU 核。各种子的平均值 [它的 95 % 区间] ± 种子之间的标准差。",
        "{generation}，种子 0 到 {last}",
    ),
}
SHARES = {  # by the key of `summary.json`
    "accuracy_heldout_scenes": ("new scenes", "新场景"),
    "accuracy_heldout_pairs": ("new pairs of shape and colour", "没见过的形状与颜色组合"),
    "accuracy_blank": ("new scenes, blank images", "新场景，空白图片"),
    "accuracy_before": ("new scenes, before training", "新场景，训练之前"),
}
LOSSES = {  # by stage and place on the curve
    ("pretrain", "first"): ("pretrain: first loss", "pretrain：第一步的 loss"),
    ("pretrain", "last"): ("pretrain: last loss", "pretrain：最后的 loss"),
    ("sft", "first"): ("sft: first loss", "sft：第一步的 loss"),
    ("sft", "last"): ("sft: last loss", "sft：最后的 loss"),
}
LAST = 0.1  # of the logged steps: the mean of these is the last loss
Figures = dict[str | tuple[str, str], float]


def figures(out: Path, generation: str, seed: int) -> Figures:
    """Shares of right answers and losses of one demo, which is run unless its folder is complete."""
    folder = out / f"{generation}-{seed}"
    demo = Demo(
        folder, seed, Listener(), lambda title, _: print(f"{folder}: {title}"), SIZE, DEMO_GENERATIONS[generation]
    )
    summary = folder / "summary.json"
    results = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else demo.run()
    values: Figures = {key: results[key] for key in SHARES}
    for stage in ("pretrain", "sft"):
        losses = [record["loss"] for record in read_metrics(demo.weights[stage].with_suffix("") / "metrics.jsonl")]
        values[stage, "first"] = losses[0]
        values[stage, "last"] = float(np.mean(losses[-max(1, round(LAST * len(losses))) :]))
    return values


def over_seeds(values: Sequence[float], is_share: bool) -> str:
    """The mean, Student's interval of it over seeds and their standard deviation; the mean alone of one seed."""
    mean, count = float(np.mean(values)), len(values)
    scale, digits, unit = (100, 1, " %") if is_share else (1, 3, "")
    if count == 1:
        return f"{scale * mean:.{digits}f}{unit}"
    deviation = float(np.std(values, ddof=1))
    half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * deviation / count**0.5
    low, high = max(0.0, mean - half), min(1.0, mean + half) if is_share else mean + half
    ends = f"{scale * low:.{digits}f}, {scale * high:.{digits}f}"
    return f"{scale * mean:.{digits}f}{unit} [{ends}] ± {scale * deviation:.{digits}f}"


def table(measured: dict[str, list[Figures]], language: str) -> str:
    """The figures of all seeds of each generation in Markdown."""
    column = list(PAGES).index(language)
    line, head = HEADS[language]
    heads = [head.format(generation=generation, last=len(runs) - 1) for generation, runs in measured.items()]
    lines = [line.format(cores=os.cpu_count()), "", f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for key, names in {**SHARES, **LOSSES}.items():
        cells = [over_seeds([values[key] for values in runs], key in SHARES) for runs in measured.values()]
        lines.append(f"| {' | '.join([names[column], *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/expect"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/expect.md and expect_zh.md")
    options = parser.parse_args()
    measured = {
        generation: [figures(options.out, generation, seed) for seed in range(options.seeds)]
        for generation in DEMO_GENERATIONS
    }
    for language, page in PAGES.items():
        text = table(measured, language)
        print(f"\n{text}")
        if options.docs:
            write_block(page, "expect", text)


if __name__ == "__main__":
    main()
