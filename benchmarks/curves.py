"""How the cost grows: with the rows of an update, their supervised tokens, the longest of them, and the size of a file.

    python -m benchmarks.curves                             two passes, some four minutes on two cores
    python -m benchmarks.curves --quick                     fewer points, one pass
    python -m benchmarks.curves --plot docs/images --docs   the picture and the table of docs/performance.md

Updates are those of the real `Run`, in fine-tuning, where all of the language model learns; the small preset, random
ids, weights and features of pictures, so that no CLIP is in the figures. Passes go through all points in turn, and the
best of each point counts. All of it is CPU time: what a busy machine disturbs least. A file is opened when it has been
opened before, so an index that is kept is there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.pages import PAGE, write_block
from benchmarks.panels import Panel, draw, line_through
from benchmarks.stores import make_jsonl, make_parquet
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.recipes import sft
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureCache
from minimind_v.core.files import write_text
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vision.encoder import VisionSpec
from minimind_v.core.model.vlm import VLM
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.step import TrainStep

PICTURE = "growth.svg"
VIT_B_16 = VisionSpec(image_size=224, patch_size=16, width=768)
PICTURE_AT = 4  # the position of a row's first patch
OPENINGS = 20  # of a file in one pass


@dataclass(frozen=True)
class Points:
    """Where the curves are measured. Rows have a picture each and, where nothing else is said, 32 supervised tokens."""

    preset: str = "small"
    rows: tuple[int, ...] = (4, 8, 16, 32, 64)
    row_length: int = 280
    supervised: tuple[int, ...] = (16, 75, 150, 225, 300)  # of each row
    supervised_rows: int = 16
    supervised_length: int = 512
    longest: tuple[int, ...] = (240, 480, 720, 1080, 1536)
    padded: tuple[int, ...] = (720, 1536)  # of these; with rows all alike there is nothing to pad
    longest_rows: int = 16
    others_length: int = 240
    files: tuple[int, ...] = (1_000, 10_000, 100_000, 600_000)


QUICK = Points(
    rows=(4, 8, 16),
    supervised=(16, 150, 300),
    supervised_rows=4,
    longest=(240, 720, 1536),
    padded=(1536,),
    longest_rows=4,
    files=(1_000, 10_000, 50_000),
)


# --- one update -------------------------------------------------------------------------------------------------------


class Learner:
    """The real optimiser step of fine-tuning over batches that are given to it, without files or a vision encoder."""

    def __init__(self, preset: str) -> None:
        torch.manual_seed(0)
        self.config = replace(sft(PRESETS[preset]), dtype="float32")
        model = VLM(self.config.model, VIT_B_16, placeholder_id=34).train()
        self.model = accelerate(model, torch.device("cpu"))
        self.train_step = TrainStep(self.config, self.model, FeatureCache())

    def seconds(self, batch: Batch) -> float:
        """CPU seconds of a step from one batch."""
        begun = time.process_time()
        self.train_step([batch], batch.supervised, len(batch), self.config.lr)
        return time.process_time() - begun


def make_batch(lengths: list[int], vocabulary: int, supervised: int = 32, padded: bool = False) -> Batch:
    """Rows of random tokens, a picture's features near the beginning, and so many supervised tokens at the end.

    `padded` rows are worked through as if all were as long as the longest.
    """
    shape = len(lengths), max(lengths)
    ends, position = torch.tensor(lengths)[:, None], torch.arange(shape[1])[None]
    input_ids = torch.randint(0, vocabulary, shape)
    supervised_mask = (position < ends) & (position >= ends - supervised)
    image_mask = (position >= PICTURE_AT) & (position < PICTURE_AT + VIT_B_16.tokens_per_image)
    return Batch(
        input_ids,
        (position < ends) | torch.tensor(padded),
        torch.where(supervised_mask, input_ids, IGNORE),
        image_mask.repeat(len(lengths), 1),
        image_features=torch.randn(len(lengths), VIT_B_16.tokens_per_image, VIT_B_16.width),
    )


def update_jobs(points: Points) -> dict[tuple[str, int], Callable[[], float]]:
    """By curve and place on it, what measures an update there."""
    learner, vocabulary = Learner(points.preset), PRESETS[points.preset].vocab_size
    jobs: dict[tuple[str, int], Callable[[], float]] = {}

    def add(curve: str, x: int, lengths: list[int], supervised: int = 32, padded: bool = False) -> None:
        jobs[curve, x] = lambda: learner.seconds(make_batch(lengths, vocabulary, supervised, padded))

    for rows in points.rows:
        add("rows", rows, [points.row_length] * rows)
    for supervised in points.supervised:
        rows = points.supervised_rows
        add("supervised", supervised * rows, [points.supervised_length] * rows, supervised)
    others = [points.others_length] * (points.longest_rows - 1)
    for longest in points.longest:  # in order of length, as a run has them
        add("longest", longest, [*others, longest])
    for longest in points.padded:
        add("padded", longest, [*others, longest], padded=True)
    jobs["rows", points.rows[0]]()  # makes the optimiser's state
    return jobs


# --- opening ----------------------------------------------------------------------------------------------------------


def opening_jobs(points: Points, folder: Path) -> dict[tuple[str, int], Callable[[], float]]:
    """By curve and rows of the file, what measures opening it again, in milliseconds."""
    jobs: dict[tuple[str, int], Callable[[], float]] = {}

    def add(curve: str, rows: int, data: Path) -> None:
        open_rows(data)  # makes the index
        jobs[curve, rows] = lambda: open_again(data)

    for rows in points.files:
        subfolder = folder / str(rows)
        subfolder.mkdir()
        make_jsonl(subfolder, rows, members=1)
        make_parquet(subfolder, rows)
        add("jsonl", rows, subfolder / "rows.jsonl")
        add("parquet", rows, subfolder / "rows.parquet")
    return jobs


def open_again(data: Path) -> float:
    """Milliseconds of CPU time, the best of several openings."""
    seconds = []
    for _ in range(OPENINGS):
        begun = time.process_time()
        open_rows(data)
        seconds.append(time.process_time() - begun)
    return min(seconds) * 1e3


# --- what is told -----------------------------------------------------------------------------------------------------


Curves = dict[str, list[tuple[int, float]]]


def measure(points: Points, passes: int, folder: Path) -> Curves:
    """All curves: points (x, y) by name."""
    jobs = opening_jobs(points, folder) | update_jobs(points)
    samples: dict[tuple[str, int], list[float]] = {key: [] for key in jobs}
    for number in range(passes):
        for (curve, x), job in jobs.items():
            samples[curve, x].append(job())
            print(f"pass {number + 1}/{passes}  {curve:11}{x:9,}  {samples[curve, x][-1]:.4g}", flush=True)
    curves: Curves = {}
    for (curve, x), measured in samples.items():
        curves.setdefault(curve, []).append((x, min(measured)))
    curves["padded"].insert(0, curves["longest"][0])  # where all are as long as the longest
    return curves


def saved(curves: Curves) -> tuple[int, float]:
    """The longest row that padding was measured for, and how much the update would have cost with it, as a ratio."""
    longest, padded = curves["padded"][-1]
    return longest, padded / dict(curves["longest"])[longest]


def table(points: Points, curves: Curves) -> str:
    """What was found, as Markdown."""
    others = f"{points.longest_rows - 1} others of {points.others_length}"
    kinds = {
        "rows": (f"rows of {points.row_length} tokens", "CPU s", "row", 1),
        "supervised": (
            f"supervised tokens of {points.supervised_rows} rows of {points.supervised_length}", "CPU s", "1,000", 1000,
        ),
        "longest": (f"tokens of the longest row, beside {others}", "CPU s", "1,000", 1000),
        "padded": ("the same, if all were padded to it", "CPU s", "1,000", 1000),
        "jsonl": ("rows of a JSONL file, opened again", "ms", "100,000", 100_000),
        "parquet": ("rows of parquet in groups of 2,000, opened again", "ms", "100,000", 100_000),
    }  # fmt: skip
    lines = ["| | from | to | one more costs | off the line, at most |", "|---|---|---|---|---|"]
    for name, (what, unit, step, size) in kinds.items():
        slope, _, off = line_through(curves[name])
        ends = " | ".join(f"{x:,}: {y:.3g} {unit}" for x, y in (curves[name][0], curves[name][-1]))
        more = f"{slope * size:.3g} {unit} a {step}" if step == "row" else f"{slope * size:.3g} {unit} per {step}"
        far = f"{off * 100:.1f} %" if len(curves[name]) > 2 else "–"  # two points are always on a line
        lines.append(f"| {what} | {ends} | {more} | {far} |")
    return "\n".join(lines)


def summary(points: Points, curves: Curves, threads: int, passes: int, quick: bool) -> str:
    """The table, what padding would cost, and how all was measured."""
    longest, ratio = saved(curves)
    how = f"{'--quick ' if quick else ''}--threads {threads} --passes {passes}"
    return (
        f"{table(points, curves)}\n\n"
        f"Padding all rows to one of {longest:,} tokens would make the step cost {ratio:.1f} times as much.\n"
        f"Measured with `{how}`."
    )


def panels(points: Points, curves: Curves) -> list[Panel]:
    """What was found, as charts."""
    beside = f"tokens of one row; {points.longest_rows - 1} others have {points.others_length}"
    of = f"supervised tokens in {points.supervised_rows} rows of {points.supervised_length}"
    return [
        Panel("Rows in a step", f"rows of {points.row_length} tokens", "s", {"": curves["rows"]}),
        Panel("Tokens that are learnt", of, "s", {"": curves["supervised"]}),
        Panel(
            "One long row", beside, "s", {"as it is": curves["longest"], "all padded to it": curves["padded"]}
        ),
        Panel(
            "Opening a file again", "rows", "ms", {"JSONL": curves["jsonl"], "parquet": curves["parquet"]}
        ),
    ]  # fmt: skip


def main() -> None:
    """Read the options, measure, tell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, help="how often every point is measured [2, quick: 1]")
    parser.add_argument("--quick", action="store_true", help="fewer points, one pass")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="[all cores]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all points")
    parser.add_argument("--plot", type=Path, metavar="DIR", help=f"draw them as {PICTURE}")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    points, passes = (QUICK, options.passes or 1) if options.quick else (Points(), options.passes or 2)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        curves = measure(points, passes, Path(folder))
    table = summary(points, curves, options.threads, passes, options.quick)
    print(f"\n{table}")
    if options.json:
        record = {"threads": options.threads, "passes": passes, "curves": curves}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        write_text(options.plot / PICTURE, draw(panels(points, curves)))
    if options.docs:
        write_block(PAGE, "curves", table)


if __name__ == "__main__":
    main()
