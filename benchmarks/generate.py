"""Seconds to the first token and tokens per second: ours against generation in the shape of the published scripts.

    python -m benchmarks.generate            five rounds, about two minutes on two cores
    python -m benchmarks.generate --quick    one round

Full size: the small preset under ViT-B/16, weights and pictures made for it (`material`). Ours is the real `Session`
and `generate_many`; the other side is `plain_chat`. One process, the same threads; sides take turns, round by round,
and what is reported are medians. Before anything is measured both sides must give the same greedy tokens to questions
about the same pictures: else the comparison would mean nothing.

first token              a picture that nobody has seen, from its file to the first token
picture before           the same, where the picture was named before the question was typed
next question            a second question in the same conversation
new conversation         another question about a picture that was asked about before
one stream               tokens after the first, drawn at temperature 0.65 from the likeliest 85 %
eight at once            eight questions side by side; the published scripts answer one at a time
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.material import make_material
from benchmarks.pages import PAGE, write_block
from benchmarks.plain_chat import PlainChat
from benchmarks.train import find_tokenizer
from minimind_v.core.formats.load import load
from minimind_v.core.generate import batch as many
from minimind_v.core.generate.sampling import GREEDY, Sampler, Sampling
from minimind_v.core.generate.session import Session

WARM = (0.65, 0.85)  # temperature and top-p, as published
QUESTIONS = (
    "What is in the picture?",
    "Describe the picture in one sentence, please.",
    "Which colours are there, and where is each of them?",
    "Is it day or night? Say how one can see that, and what the weather is like.",
    "How many people are there?",
    "What is in front, and what behind it?",
    "Is anything moving?",
    "Where may this have been taken? Give two or three reasons for what you think.",
)
TOKENS = 96  # of a stream that is timed
AGREED = 24  # greedy tokens of each question that both sides must give alike
SEED = 42


class Clock(Sampler):
    """Notes when each token is drawn."""

    times: list[tuple[float, float]] = []  # noqa: RUF012 (one for all: several rows are one stream of work)

    def __call__(self, logits: torch.Tensor) -> int:
        token = super().__call__(logits)
        self.times.append(now())
        return token


def now() -> tuple[float, float]:
    """Seconds on the wall, and of this process and its threads."""
    return time.perf_counter(), time.process_time()


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """How long it takes."""
    begun = now()
    work()
    ended = now()
    return ended[0] - begun[0], ended[1] - begun[1]


def per_token(times: list[tuple[float, float]], rows: int = 1) -> tuple[float, float]:
    """Seconds per token behind the first one of each row."""
    first, last, count = times[rows - 1], times[-1], len(times) - rows
    return (last[0] - first[0]) / count, (last[1] - first[1]) / count


class Ours:
    """The real thing."""

    def __init__(self, folder: Path) -> None:
        loaded = load(folder / "weights.safetensors", folder / "vision", folder / "tokenizer", "cpu")
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        many.Sampler = Clock

    def start(self) -> Session:
        session = Session(self.model, self.tokenizer, GREEDY)
        session.sampler = Clock(Sampling(*WARM, seed=SEED))
        Clock.times.clear()
        return session

    def greedy_text(self, question: str, picture: Path) -> str:
        return "".join(Session(self.model, self.tokenizer, GREEDY).ask(question, [picture], AGREED))

    def first_token(self, picture: Path) -> tuple[float, float]:
        session = self.start()
        return seconds(lambda: list(session.ask(QUESTIONS[0], [picture], 1)))

    def picture_before(self, picture: Path) -> tuple[float, float]:
        session = self.start()
        shown = session.encode(picture)
        return seconds(lambda: list(session.ask(QUESTIONS[0], [shown], 1)))

    def next_question(self, picture: Path) -> tuple[float, float]:
        session = self.start()
        list(session.ask(QUESTIONS[0], [picture], AGREED))
        return seconds(lambda: list(session.ask(QUESTIONS[2], [], 1)))

    def new_conversation(self, picture: Path) -> tuple[float, float]:
        list(self.start().ask(QUESTIONS[0], [picture], 1))
        session = self.start()
        return seconds(lambda: list(session.ask(QUESTIONS[2], [picture], 1)))

    def one_stream(self, picture: Path) -> tuple[float, float]:
        list(self.start().ask(QUESTIONS[1], [picture], TOKENS))
        return per_token(Clock.times)

    def eight_at_once(self, picture: Path) -> tuple[float, float]:
        Clock.times.clear()
        asked = [many.Question(question, [picture]) for question in QUESTIONS]
        many.generate_many(self.model, self.tokenizer, asked, Sampling(*WARM, seed=SEED), TOKENS)
        return per_token(Clock.times, len(QUESTIONS))


class Plain:
    """The published shape."""

    def __init__(self, folder: Path) -> None:
        self.chat = PlainChat(folder)

    def ask(self, turns: list[str], picture: Path, limit: int, temperature: float = WARM[0]) -> list[tuple[int, str]]:
        """Questions, each but the last with its answer behind it."""
        messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        messages[0]["content"] = f"<image>\n{turns[0]}"
        return list(self.chat.answer(messages, [picture], limit, temperature, WARM[1]))

    def greedy_text(self, question: str, picture: Path) -> str:
        return self.ask([question], picture, AGREED, temperature=0)[-1][1]

    def first_token(self, picture: Path) -> tuple[float, float]:
        return seconds(lambda: self.ask([QUESTIONS[0]], picture, 1))

    picture_before = first_token  # it looks at pictures when it is asked

    def next_question(self, picture: Path) -> tuple[float, float]:
        answer = self.ask([QUESTIONS[0]], picture, AGREED)[-1][1]
        return seconds(lambda: self.ask([QUESTIONS[0], answer, QUESTIONS[2]], picture, 1))

    def new_conversation(self, picture: Path) -> tuple[float, float]:
        return seconds(lambda: self.ask([QUESTIONS[2]], picture, 1))

    def one_stream(self, picture: Path) -> tuple[float, float]:
        messages = [{"role": "user", "content": f"<image>\n{QUESTIONS[1]}"}]
        return per_token([now() for _ in self.chat.answer(messages, [picture], TOKENS, *WARM)])

    eight_at_once = one_stream


MEASURES = {  # → what the page calls it
    "first_token": "first token, a new image",
    "picture_before": "first token, image named before the question is typed",
    "next_question": "next question in the conversation",
    "new_conversation": "another conversation about the same image",
    "one_stream": "one stream",
    "eight_at_once": "eight at once",
}
NEW = {"first_token": 0, "picture_before": 1}  # ask about pictures of their own
RATES = ("one_stream", "eight_at_once")


def make_pictures(folder: Path, count: int, tokenizer: Path) -> list[Path]:
    """The material, and its pictures as files."""
    make_material(folder, tokenizer, {"pretrain": count}, SEED)
    with zipfile.ZipFile(folder / "pretrain.zip") as pictures:
        pictures.extractall(folder)
        return [folder / name for name in sorted(pictures.namelist())]


def check_agreement(sides: dict[str, Ours | Plain], picture: Path) -> None:
    """Stops where the sides answer differently."""
    for question in QUESTIONS:
        ours, plain = (side.greedy_text(question, picture) for side in sides.values())
        if ours != plain:
            raise SystemExit(f"{question}\n  ours:  {ours!r}\n  plain: {plain!r}\nnothing is compared")


def compare(rounds: int, folder: Path) -> dict[str, dict]:
    """Per measure and side, seconds of every round on the wall and of CPU; medians, and their ratios."""
    pictures = make_pictures(folder, 2 + 3 * rounds, find_tokenizer())
    sides = {"ours": Ours(folder), "plain": Plain(folder)}
    check_agreement(sides, pictures[0])
    for side in sides.values():
        side.first_token(pictures[1])  # a warm-up
    results: dict[str, dict] = {}
    for name in MEASURES:
        runs: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for number in range(rounds):
            picture = pictures[2 + number + rounds * NEW.get(name, 2)]
            for label, side in sides.items():
                runs[label].append(getattr(side, name)(picture))
        walls, cpus = ({label: statistics.median(run[n] for run in runs[label]) for label in sides} for n in (0, 1))
        results[name] = {
            "seconds": walls,
            "cpu_seconds": cpus,
            "ratio": walls["plain"] / walls["ours"],
            "cpu_ratio": cpus["plain"] / cpus["ours"],
            "runs": runs,
        }
        print(line_of(name, results[name]), flush=True)
    return results


def line_of(name: str, result: dict) -> str:
    """One line of the table: milliseconds to a token, or tokens per second."""
    ours, plain = result["seconds"].values()
    rate = name in RATES
    values = f"{1 / plain:9.0f} tokens/s{1 / ours:9.0f} tokens/s" if rate else f"{plain:13.3f} s   {ours:13.3f} s   "
    return f"{name.replace('_', ' '):18}{values}{result['ratio']:8.1f} ×{result['cpu_ratio']:10.1f} ×"


def page(results: dict[str, dict], threads: int) -> str:
    """The table of docs/performance.md."""
    lines = [
        f"Medians of {len(next(iter(results.values()))['runs']['ours'])} rounds, {threads} threads; in brackets the "
        "slowest and the fastest round.",
        "",
        "| | published shape | mmv | ratio | of CPU time |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        ours, plain = result["seconds"].values()
        shown = [f"{1 / taken:.0f} tokens/s" if name in RATES else f"{taken:.3f} s" for taken in (plain, ours)]
        rounds = [b[0] / a[0] for a, b in zip(result["runs"]["ours"], result["runs"]["plain"], strict=True)]
        spread = f"({min(rounds):.2f} – {max(rounds):.2f})"
        lines.append(
            f"| {MEASURES[name]} | {' | '.join(shown)} | {result['ratio']:.2f}× {spread} | {result['cpu_ratio']:.2f}× |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the options, measure, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often every side is measured [5]")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side [all cores]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'':18}{'published shape':>17}{'ours':>17}{'ratio':>11}{'of CPU':>12}   ({options.threads} threads)")
    with tempfile.TemporaryDirectory() as folder:
        results = compare(1 if options.quick else options.rounds, Path(folder))
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "results": results}, indent=1) + "\n")
    if options.docs:
        write_block(PAGE, "generation", page(results, options.threads))


if __name__ == "__main__":
    main()
