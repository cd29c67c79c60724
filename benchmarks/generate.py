"""Seconds to the first token and tokens per second: ours against generation in the shape of the published scripts.

    python -m benchmarks.generate            five rounds, about two minutes on two cores
    python -m benchmarks.generate --quick    one round

Full size: the small preset under ViT-B/16, weights and pictures made for it (`material`). Ours is the real `Session`
and `Engine`; the other side is `plain_chat`. One process, the same threads; sides take turns, round by round,
and what is reported are medians. Before anything is measured both sides must give the same greedy tokens to questions
about the same pictures: else the comparison would mean nothing.

first token              a picture that nobody has seen, from its file to the first token
picture before           the same, where the picture was named before the question was typed
next question            a second question in the same conversation
new conversation         another question about a picture that was asked about before
one stream               tokens after the first, drawn at temperature 0.65 from the likeliest 85 %
beside seven             a picture that nobody has seen, asked about while seven other questions are answered
eight at once            eight questions side by side; the published scripts answer one at a time

At the end: the tokens per second of eight streams against one, and the first token beside seven others against alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.material import make_material
from benchmarks.pages import PAGE, write_block
from benchmarks.plain_chat import PlainChat
from benchmarks.train import find_tokenizer
from minimind_v.core.formats.load import load
from minimind_v.core.generate.engine import Engine, Request
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
    streams: list[int] = []  # noqa: RUF012 (whose token it was)

    def __call__(self, logits: torch.Tensor, text_ids: Sequence[int] = ()) -> int:
        token = super().__call__(logits, text_ids)
        self.times.append(now())
        self.streams.append(id(self))
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


def per_token(times: list[tuple[float, float]], begin: int = 0, end: int = -1) -> tuple[float, float]:
    """Seconds per token behind the one at `begin`."""
    count = len(times[begin:end])
    return (times[end][0] - times[begin][0]) / count, (times[end][1] - times[begin][1]) / count


class Ours:
    """The real thing."""

    def __init__(self, folder: Path, first: Path) -> None:
        self.first = first  # what the others ask about
        loaded = load(folder / "weights.safetensors", folder / "clip", folder / "tokenizer", "cpu")
        self.model, self.tokenizer = loaded.model, loaded.tokenizer

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
        """While all eight are decoded."""
        engine = Engine(self.model, self.tokenizer)
        clocks = [self.submit(engine, question, picture, TOKENS) for question in QUESTIONS]
        Clock.times.clear()
        Clock.streams.clear()
        while engine.step():
            pass
        begin = max(Clock.streams.index(id(clock)) for clock in clocks)
        end = min(len(Clock.streams) - 1 - Clock.streams[::-1].index(id(clock)) for clock in clocks)
        return per_token(Clock.times, begin, end)

    def beside_seven(self, picture: Path) -> tuple[float, float]:
        engine = Engine(self.model, self.tokenizer)
        clocks = [self.submit(engine, question, self.first, 400) for question in QUESTIONS[1:]]
        Clock.streams.clear()
        while len(set(Clock.streams)) < len(clocks):
            engine.step()
        return seconds(lambda: self.first_of(engine, picture))

    def first_of(self, engine: Engine, picture: Path) -> None:
        """The first token of a question, whatever else is answered."""
        clock = self.submit(engine, QUESTIONS[0], picture, 1)
        while id(clock) not in Clock.streams:
            engine.step()

    def submit(self, engine: Engine, question: str, picture: Path, limit: int) -> Clock:
        clock = Clock(Sampling(*WARM, seed=SEED))
        prompt = engine.prompt([{"role": "user", "content": f"<image>\n{question}"}], [picture])
        engine.submit(Request(prompt, clock, limit), lambda event: None)
        return clock


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

    picture_before = beside_seven = first_token  # it looks at pictures when it is asked, one question after the other

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
    "beside_seven": "first token, a new image, while seven others are answered",
    "one_stream": "one stream",
    "eight_at_once": "eight at once",
}
NEW = {"first_token": 0, "picture_before": 1, "beside_seven": 2}  # ask about pictures of their own
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
    pictures = make_pictures(folder, 2 + 4 * rounds, find_tokenizer())
    sides = {"ours": Ours(folder, pictures[0]), "plain": Plain(folder)}
    check_agreement(sides, pictures[0])
    for side in sides.values():
        side.first_token(pictures[1])  # a warm-up
    results: dict[str, dict] = {}
    for name in MEASURES:
        runs: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for number in range(rounds):
            picture = pictures[2 + number + rounds * NEW.get(name, 3)]
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


def ratios(results: dict[str, dict]) -> str:
    """What company costs and gains."""
    ours = {name: result["seconds"]["ours"] for name, result in results.items()}
    rate, wait = ours["one_stream"] / ours["eight_at_once"], ours["beside_seven"] / ours["first_token"]
    return (
        f"Eight streams together get {rate:.1f} times the tokens per second of one. A first token takes {wait:.2f} "
        "times as long while seven others are answered."
    )


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
    return "\n".join([*lines, "", ratios(results)])


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
    print(ratios(results))
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "results": results}, indent=1) + "\n")
    if options.docs:
        write_block(PAGE, "generation", page(results, options.threads))


if __name__ == "__main__":
    main()
