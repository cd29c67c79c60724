"""How long `mmv eval --task` takes: the demo's size as a whole command, the full size against one question at a time.

    python -m benchmarks.evaluate            about a quarter of an hour on two cores
    python -m benchmarks.evaluate --quick    some two minutes, a tenth of the questions

Demo size: a model that the demo trained in its short form, and 9,673 questions about 1,000 scenes of its world, as many
as the test set of easy-VQA has. What is timed is the command from its start to its report, with all four variants of
each question; alone, and beside a busy process.

Full size: the small preset under ViT-B/16 (`material`), taught in a few steps to answer yes or no, and 1,020 yes/no
questions, six about each image, as POPE has. Ours asks with the image only; the other side is `plain_chat`: each
question from its picture's file to the last token of its answer. Sides take turns, and both must give the same answers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.generate import make_pictures, seconds
from benchmarks.material import WORDS
from benchmarks.pages import PAGE, write_block
from benchmarks.plain_chat import PlainChat
from benchmarks.train import find_tokenizer
from minimind_v.core.data.processor import Processor
from minimind_v.core.demo import world
from minimind_v.core.demo.run import SHORT, Demo
from minimind_v.core.evaluate import measure
from minimind_v.core.evaluate.ask import SEEN
from minimind_v.core.evaluate.benchmarks import open_benchmark
from minimind_v.core.evaluate.by_task import choose_task, evaluate_task
from minimind_v.core.formats.checkpoint import export_tensors, write_checkpoint
from minimind_v.core.formats.load import LoadedModel, load
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.monitor.metrics import Listener

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS, SCENES = 9673, 1000  # of easy-VQA's test set
IMAGES, ABOUT_EACH = 170, 6  # of full size; so many questions about each has POPE
LIMIT = 16  # tokens of an answer, as the task allows
QUESTION = "Is there a {} in the picture?"
LESSONS, UNDECIDED = 90, 0.38  # steps that teach yes and no at most, and the mean loss of who knows only these two
SEED = 42


def write_lines(path: Path, rows: list[dict]) -> Path:
    """A JSONL file."""
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path


# --- the demo's size --------------------------------------------------------------------------------------------------


def make_scenes(folder: Path, questions: int, scenes: int) -> Path:
    """Pictures of the demo's world and different questions about each, drawn from a seed."""
    rng, rows = random.Random(SEED), []
    for number in range(scenes):
        scene = world.make_scene(rng)
        (folder / f"{number}.jpg").write_bytes(world.jpeg(world.draw(scene, rng)))
        count = questions * (number + 1) // scenes - questions * number // scenes
        about: dict[str, str] = {}
        while len(about) < count:
            about |= {question.text: question.answer for question in world.questions(scene, rng)}
        rows += [{"question": text, "answer": about[text], "image": f"{number}.jpg"} for text in list(about)[:count]]
    return write_lines(folder / "questions.jsonl", rows)


@contextmanager
def beside(others: int):
    """So many processes that keep a core busy."""
    company = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        yield
    finally:
        for other in company:
            other.kill()
            other.wait()


def run_command(demo: Demo, data: Path, threads: int) -> tuple[float, float]:
    """Wall and CPU seconds of the whole command."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "minimind_v", "eval", "--task", "vqa", "--model", demo.weights["sft"],
            "--vision-model", demo.vision, "--tokenizer", demo.tokenizer, "--data", data, "--images", data.parent,
            "--out", out, "--device", "cpu", "--json",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        used, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, check=True)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter() - begun, ended.ru_utime + ended.ru_stime - used.ru_utime - used.ru_stime


def time_command(folder: Path, rounds: int, share: float, threads: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of every round, alone and beside a busy process."""
    demo = Demo(folder / "demo", SEED, Listener(), lambda title, command: None, SHORT)
    demo.run()
    data = make_scenes(folder, int(QUESTIONS * share), int(SCENES * share))
    results: dict[str, list[tuple[float, float]]] = {"alone": [], "beside a busy process": []}
    for _ in range(rounds):
        for others, runs in enumerate(results.values()):
            with beside(others):
                runs.append(run_command(demo, data, threads))
    return results


# --- full size --------------------------------------------------------------------------------------------------------


def make_questions(pictures: list[Path]) -> list[dict]:
    """Yes/no questions, each about the next picture, so that those about a picture lie apart in the file."""
    nouns = WORDS.split()
    return [
        {"question": QUESTION.format(random.Random(number).choice(nouns)), "answer": "yes",
         "image": pictures[number % len(pictures)].name}
        for number in range(len(pictures) * ABOUT_EACH)
    ]  # fmt: skip


def teach(loaded: LoadedModel, pictures: list[Path]) -> None:
    """Teach the last block of a model with random weights to say yes or no."""
    model, rng, pad = loaded.model, random.Random(SEED), torch.nn.utils.rnn.pad_sequence
    processor = Processor(loaded.tokenizer, model.spec)
    images = torch.from_numpy(np.stack([processor.pixels(picture) for picture in pictures]))
    with torch.no_grad():
        features = model.vision_encoder(images)  # [M, P, width]
    for parameter in model.parameters():
        parameter.requires_grad = False
    taught = [parameter.requires_grad_() for parameter in model.model.layers[-1].parameters()]
    optimizer = torch.optim.AdamW(taught, lr=3e-3)
    losses: list[float] = []
    for _ in range(LESSONS):
        rows = [
            processor.prompts.row(
                [
                    {"role": "user", "content": f"<image>\n{QUESTION.format(rng.choice(WORDS.split()))}"},
                    {"role": "assistant", "content": rng.choice(("yes", "no"))},
                ],
                images=1,
                max_length=512,
            )
            for _ in pictures
        ]
        ids = pad([torch.tensor(row.input_ids) for row in rows], True, loaded.tokenizer.pad_id)  # [M, T]
        image_mask, answers = (pad([torch.tensor(mask) for mask in masks], True, False) for masks in (
            [row.image_mask for row in rows], [row.loss_mask for row in rows],
        ))  # fmt: skip
        labels = ids.masked_fill(~answers, IGNORE)
        loss = model(ids, image_features=features, image_mask=image_mask, labels=labels).loss
        losses.append(loss.item())
        if statistics.mean(losses[-4:]) < UNDECIDED:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise SystemExit(f"the model did not learn to answer: loss {losses[-1]:.2f}")


class Ours:
    """The real thing, without the variants that one question at a time does not ask."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.loaded = load(folder / "weights.safetensors", folder / "vision", folder / "tokenizer", "cpu")

    def answers(self, rows: list[dict]) -> list[str]:
        self.number += 1
        data = write_lines(self.folder / "questions.jsonl", rows)

        def only_seen(question, plan, others):
            return {SEEN: plan.images[question.id]}

        with patch.object(measure, "variants_of", only_seen):
            store = open_benchmark(data, self.folder)
            report = evaluate_task(self.loaded, choose_task("yesno"), store, self.folder / f"out{self.number}").report
        with open(report["predictions"], encoding="utf-8") as lines:
            return [json.loads(line)["answer"] for line in lines]


class Plain:
    """The published shape."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.chat = folder, PlainChat(folder)

    def answers(self, rows: list[dict]) -> list[str]:
        return [self.answer(row["question"], self.folder / row["image"]) for row in rows]

    def answer(self, question: str, picture: Path) -> str:
        messages = [{"role": "user", "content": f"<image>\n{question}"}]
        return ["", *(text for _, text in self.chat.answer(messages, [picture], LIMIT, 0, 1))][-1].strip()


def compare(folder: Path, rounds: int, share: float) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of every round and side; all rounds together ask all questions."""
    per_round = int(IMAGES * share / rounds)
    pictures = make_pictures(folder, 1 + per_round * rounds, find_tokenizer())
    taught = load(folder / "weights.safetensors", folder / "vision", folder / "tokenizer", "cpu")
    teach(taught, pictures[:8])
    tensors = export_tensors(taught.model)
    write_checkpoint(folder / "weights.safetensors", tensors, taught.model.config, "sft")
    sides = {"mmv eval": Ours(folder), "one at a time": Plain(folder)}
    results: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    said: Counter[str] = Counter()
    for number in range(-1, rounds):  # the first warms up
        shown = pictures[1 + number * per_round :][:per_round] if number >= 0 else pictures[:1]
        rows, answers = make_questions(shown), []
        for label, side in sides.items():
            taken = seconds(lambda side=side: answers.append(side.answers(rows)))  # noqa: B023
            results[label] += [taken] if number >= 0 else []
        if answers[0] != answers[1]:
            first = next(row for row, ours, plain in zip(rows, *answers, strict=True) if ours != plain)
            raise SystemExit(f"the sides answer differently, first {first}: nothing is compared")
        said.update(answers[0])
    print("answers:", dict(said.most_common(4)))
    return results


# --- results ----------------------------------------------------------------------------------------------------------


def page(command: dict, sides: dict, questions: int, full_questions: int, threads: int) -> str:
    """The text of docs/performance.md."""
    rounds = len(sides["mmv eval"])
    lines = [
        f"{threads} threads, medians of {rounds} rounds.",
        "",
        f"| demo size, {questions:,} questions, four variants each | seconds | of CPU time |",
        "|---|---|---|",
        *(f"| {name} | {middle(runs, 0)} ({spread(runs)}) | {middle(runs, 1)} |" for name, runs in command.items()),
        "",
        f"| full size, {full_questions:,} yes/no questions with their image | seconds | of CPU time |",
        "|---|---|---|",
        *(f"| {name} | {total(runs, 0)} | {total(runs, 1)} |" for name, runs in sides.items()),
        "",
        f"Of a round, one at a time takes {ratio(sides, 0)} times as long, and {ratio(sides, 1)} times the CPU time.",
    ]  # fmt: skip
    return "\n".join(lines)


def middle(runs: list[tuple[float, float]], which: int) -> str:
    return f"{statistics.median(run[which] for run in runs):.0f}"


def total(runs: list[tuple[float, float]], which: int) -> str:
    return f"{sum(run[which] for run in runs):.0f}"


def spread(runs: list[tuple[float, float]]) -> str:
    return f"{min(run[0] for run in runs):.0f} – {max(run[0] for run in runs):.0f}"


def ratio(sides: dict[str, list[tuple[float, float]]], which: int) -> str:
    """The median of the rounds' ratios, and the smallest and the largest."""
    ours, plain = sides.values()
    ratios = [b[which] / a[which] for a, b in zip(ours, plain, strict=True)]
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} – {max(ratios):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is measured [5]")
    parser.add_argument("--quick", action="store_true", help="one round, a tenth of the questions")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side [all cores]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--docs", action="store_true", help="write the figures into docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds, share = (1, 0.1) if options.quick else (options.rounds, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        command = time_command(Path(folder), rounds, share, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        sides = compare(Path(folder), rounds, share)
    text = page(command, sides, int(QUESTIONS * share), int(IMAGES * share) * ABOUT_EACH, options.threads)
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"command": command, "sides": sides}, indent=1) + "\n")
    if options.docs:
        write_block(PAGE, "evaluation", text)


if __name__ == "__main__":
    main()
